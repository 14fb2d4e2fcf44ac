"""Passkey retrieval by length and depth, by several ways to read past the trained window.

Code words, each for a place of its own, are hidden in a long text, one after every SPACING
tokens. The model gets the text up to a length and completes "The code word for the harbour
is": once for every place so far. All questions of a text share its start, so the engine reads
the text once, and its prefix cache does the rest. An answer counts if it has the code word.

Methods are NAME or NAME:OPTION=NUMBER,...: plain, yarn, dynamic, dca, dca+yarn; see methods.py.
With --output, what is there already is kept, and methods that are not there are added.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import corpus
import methods
import study
import typer
from rich.progress import track
from rich.table import Table
from study import K

LENGTHS = (2 * K, 4 * K, 8 * K, 12 * K, 16 * K, 24 * K, 32 * K)
FIRST = ("north", "south", "east", "west", "old", "new", "upper", "lower")
SECOND = ("harbour", "library", "museum", "station", "castle", "market", "garden", "tower")
ANSWER = 8  # tokens


@dataclass(frozen=True)
class Needle:
    """A code word, and the position of the first token of the sentence that says it."""

    place: str
    code: str
    position: int


def question(place: str) -> str:
    # A model this small completes a sentence it has read more surely than it answers.
    return f"The code word for the {place} is"


def haystack(
    tokens: list[int], tokenizer: Any, length: int, spacing: int, seed: int
) -> tuple[list[int], list[Needle]]:
    """The text with its needles, cut to `length` tokens."""
    places = [f"{first} {second}" for first in FIRST for second in SECOND]
    chosen = random.Random(seed)
    chosen.shuffle(places)
    text, needles = list(tokens[: spacing // 2]), []
    while len(text) < length:
        if len(needles) == len(places):
            raise typer.BadParameter(f"there are {len(places)} places: take a larger --spacing")
        needle = Needle(places[len(needles)], str(chosen.randrange(10000, 100000)), len(text))
        needles.append(needle)
        sentence = f"\n\n{question(needle.place)} {needle.code}. Remember it.\n\n"
        text += tokenizer(sentence, add_special_tokens=False)["input_ids"]
        read = spacing // 2 + (len(needles) - 1) * spacing
        text += tokens[read : read + spacing]
    return text[:length], needles


def ask(
    llm: Any, tokenizer: Any, text: list[int], needles: list[Needle], length: int
) -> list[dict[str, Any]]:
    """Each needle's question, at the end of `length` tokens or some less."""
    from vllm import SamplingParams

    room = 32
    start = text[: length - room]
    hidden = [needle for needle in needles if needle.position < length - 3 * room]
    prompts = [
        {"prompt_token_ids": start + tokenizer(end, add_special_tokens=False)["input_ids"]}
        for end in (f"\n\n{question(needle.place)}" for needle in hidden)
    ]
    parameters = SamplingParams(temperature=0, max_tokens=ANSWER)
    # The first one alone: the others find its blocks.
    outputs = llm.generate(prompts[:1], parameters, use_tqdm=False)
    outputs += llm.generate(prompts[1:], parameters, use_tqdm=False)
    answers = [output.outputs[0].text for output in outputs]
    return [
        {
            "length": length,
            "position": needle.position,
            "code": needle.code,
            "answer": answer,
            "right": needle.code in answer,
        }
        for needle, answer in zip(hidden, answers, strict=True)
    ]


def main(
    model: Annotated[Path, typer.Argument(help="A directory.")] = study.DEMO_MODEL,
    method: Annotated[str, typer.Option(help="Methods, spaces between.")] = methods.DEFAULT,
    lengths: Annotated[str, typer.Option(help="Tokens.")] = " ".join(map(str, LENGTHS)),
    spacing: Annotated[int, typer.Option(help="Tokens between two code words.")] = 512,
    text: Annotated[str, typer.Option(help="Works, or text files.")] = " ".join(corpus.WORKS),
    seed: int = 0,
    dtype: str = "float32",
    engine_option: Annotated[str, typer.Option(help="JSON: other EngineArgs of vLLM.")] = "{}",
    output: Annotated[Path | None, typer.Option(help="A record as JSON.")] = None,
) -> None:
    ends = sorted(int(length) for length in lengths.split())
    methods.prepare_environment()
    tokenizer = study.tokenizer_of(model)
    haystacks = {
        work: haystack(tokens, tokenizer, ends[-1], spacing, seed + number)
        for number, (work, tokens) in enumerate(study.works(text, tokenizer).items())
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
        {"works": list(haystacks), "spacing": spacing, "seed": seed},
        output,
        measure,
    )
    table = Table("tokens", *results)
    for length in map(str, ends):
        shares = (found["accuracy"][length] for found in results.values())
        table.add_row(length, *(f"{share:.0%}" for share in shares))
    study.console.print(table)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, rich_markup_mode="markdown")
    app.command(help=__doc__)(main)
    app()
