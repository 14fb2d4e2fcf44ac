"""Passkey retrieval by length and depth, by several ways to read past the trained window.

Numbers of five digits, each of another thing, are hidden in a long text, one after every
SPACING tokens. The model gets the text up to a length and completes "The code word for the
vault is": once for every thing so far. All questions of a text share its start, so the engine
reads the text once, and its prefix cache does the rest. An answer counts if it has the number.
Each text is read several times, with the things in another order.

Methods are NAME or NAME:OPTION=NUMBER,...: plain, yarn, dynamic, dca, dca+yarn; see methods.py.
With --output, what is there already is kept, and methods that are not there are added.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import track

from scripts.common import corpus
from scripts.quality import methods, study
from scripts.quality.study import K

LENGTHS = (2 * K, 4 * K, 8 * K, 12 * K, 16 * K, 24 * K, 32 * K)
# Unlike one another: a small model mixes up the two gardens of a house.
THINGS = (
    "The code word for the vault is",
    "The telephone number of the doctor is",
    "The weight of the golden statue in grams is",
    "The password of the old computer is",
    "The number of the secret bank account is",
    "The combination of the kitchen safe is",
    "The licence plate of the red lorry is",
    "The serial number of the broken clock is",
)
ANSWER = 8  # tokens
ROOM = 32  # tokens for a question, before a text's end


@dataclass(frozen=True)
class Needle:
    """A number, the sentence's start that asks for it, and where the sentence stands."""

    question: str
    number: str
    position: int


def haystack(
    tokens: list[int], tokenizer: Any, length: int, spacing: int, seed: int
) -> tuple[list[int], list[Needle]]:
    """The text with its needles, cut to `length` tokens."""
    chosen = random.Random(seed)
    things = list(THINGS)
    chosen.shuffle(things)
    read = spacing // 8  # of the text
    text, needles = list(tokens[:read]), []
    while len(text) < length:
        if not things:
            raise typer.BadParameter(f"there are {len(THINGS)} things: take a larger --spacing")
        needle = Needle(things.pop(), str(chosen.randrange(10000, 100000)), len(text))
        needles.append(needle)
        # A model this small completes a sentence it has read more surely than it answers.
        sentence = f"\n\n{needle.question} {needle.number}. Remember it.\n\n"
        text += tokenizer(sentence, add_special_tokens=False)["input_ids"]
        text += tokens[read : read + spacing]
        read += spacing
    return text[:length], needles


def ask(
    llm: Any,
    tokenizer: Any,
    text: list[int],
    needles: list[Needle],
    length: int,
    cached: bool = False,
) -> list[dict[str, Any]]:
    """Each needle's question, at the end of `length` tokens or some less.

    Raises:
        RuntimeError: the text was to be cached, and was not.
    """
    from vllm import SamplingParams

    start = text[: length - ROOM]
    hidden = [needle for needle in needles if needle.position < length - 3 * ROOM]
    prompts = [
        {"prompt_token_ids": start + tokenizer(end, add_special_tokens=False)["input_ids"]}
        for end in (f"\n\n{needle.question}" for needle in hidden)
    ]
    parameters = SamplingParams(temperature=0, max_tokens=ANSWER)
    # The first one alone: the others find its blocks.
    outputs = llm.generate(prompts[:1], parameters, use_tqdm=False)
    outputs += llm.generate(prompts[1:], parameters, use_tqdm=False)
    if cached and outputs[0].num_cached_tokens < len(start) * 3 // 4:
        raise RuntimeError(f"{outputs[0].num_cached_tokens} tokens were cached")
    answers = [output.outputs[0].text for output in outputs]
    return [
        {
            "length": length,
            "position": needle.position,
            "question": needle.question,
            "number": needle.number,
            "answer": answer,
            "right": needle.number in answer,
        }
        for needle, answer in zip(hidden, answers, strict=True)
    ]


def main(
    model: Annotated[Path, typer.Argument(help="A directory.")] = study.DEMO_MODEL,
    method: Annotated[str, typer.Option(help="Methods, spaces between.")] = methods.DEFAULT,
    lengths: Annotated[str, typer.Option(help="Tokens.")] = " ".join(map(str, LENGTHS)),
    spacing: Annotated[int, typer.Option(help="Tokens between two numbers.")] = 4 * K,
    text: Annotated[str, typer.Option(help="Works, or text files.")] = " ".join(corpus.WORKS),
    orders: Annotated[int, typer.Option(help="Times that each text is read.")] = 2,
    dtype: str = "float32",
    engine_option: Annotated[str, typer.Option(help="JSON: other EngineArgs of vLLM.")] = "{}",
    output: Annotated[Path | None, typer.Option(help="A record as JSON.")] = None,
) -> None:
    ends = sorted(int(length) for length in lengths.split())
    if ends[0] < spacing // 8 + 128:
        raise typer.BadParameter(f"with numbers {spacing} apart, {ends[0]} tokens hide none")
    methods.prepare_environment()
    tokenizer = study.tokenizer_of(model)
    haystacks = {
        f"{work}, order {seed}": haystack(tokens, tokenizer, ends[-1], spacing, seed)
        for work, tokens in study.works(text, tokenizer).items()
        for seed in range(orders)
    }

    def measure(label: str, llm: Any) -> dict[str, Any]:
        answers = {
            work: [
                answer
                for length in track(ends, f"{label}: {work}")
                for answer in ask(llm, tokenizer, *found, length)
            ]
            for work, found in haystacks.items()
        }
        every = [answer for given in answers.values() for answer in given]
        accuracy = {}
        for length in ends:
            right = [answer["right"] for answer in every if answer["length"] == length]
            accuracy[str(length)] = sum(right) / len(right)
        return {"accuracy": accuracy, "answers": answers}

    results = study.compare(
        method,
        model,
        ends[-1] + K,
        {"dtype": dtype, "enforce_eager": True, **json.loads(engine_option)},
        {"works": list(haystacks), "lengths": ends, "spacing": spacing},
        output,
        measure,
    )
    study.show(results, ends, lambda found, length: f"{found['accuracy'][length]:.0%}")


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, rich_markup_mode="markdown")
    app.command(help=__doc__)(main)
    app()
