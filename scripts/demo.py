"""Ask a small model about a text longer than its window, with and without DCA.

A code word is hidden near the start of a real text, far beyond the 8,192 tokens that the model
was trained on. Each server, the one with Dual Chunk Attention and one with vLLM's own
attention, is asked for it, and scores the text: its perplexity just inside the window and at
the end.

Run it with scripts/demo. It uses the server at --url if one runs there, else starts one. Exits
with 1 unless DCA's perplexity at the end of the text is at most a tenth of plain attention's.
"""

import argparse
import contextlib
import math
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import corpus
import demo_model
from openai import OpenAI
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from tokenizers import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / ".cache" / "demo-model"
WINDOW = 8192
TAIL = 1024
CODE = "48213"
FACT = f"The code word for the vault is {CODE}. Remember it."
QUESTION = "What is the code word for the vault?"
PLAIN_URL = "http://localhost:8001"
# Without a rotary table as long as the text, plain attention would read past the table's end.
PLAIN_ARGUMENTS = (
    *("--port", "8001", "--attention-backend", "cpu_attn"),
    *("--hf-overrides", '{"max_position_embeddings": 32768}'),
)

console = Console()


@dataclass(frozen=True)
class Measured:
    prompt_tokens: int
    first_token_s: float
    answer: str
    inside: float
    """Perplexity over the last TAIL tokens of the window."""
    beyond: float
    """Perplexity over the last TAIL tokens of the text."""


@contextlib.contextmanager
def working(what: str) -> Iterator[Progress]:
    """Show a spinner with the time so far, left standing with the final time."""
    columns = (
        SpinnerColumn(finished_text="✓"),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(what, total=1)
        yield progress
        progress.update(task, completed=1)


def is_up(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2):
            return True
    except OSError:
        return False


@contextlib.contextmanager
def server(url: str, *arguments: str) -> Iterator[None]:
    """Start `scripts/serve` and stop it at the end; leave a server that already runs alone."""
    if is_up(url):
        yield
        return
    log = ROOT / ".cache" / f"server-{url.rpartition(':')[2]}.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [ROOT / "scripts" / "serve", *arguments], stdout=output, stderr=subprocess.STDOUT
        )
    try:
        with working(f"starting a server at {url} (log: {log.relative_to(ROOT)})"):
            while not is_up(url):
                if process.poll() is not None:
                    sys.exit(f"the server did not start; its log is {log}")
                time.sleep(1)
        yield
    finally:
        process.terminate()
        process.wait()


def perplexity(logprobs: list[float]) -> float:
    return math.exp(-sum(logprobs) / len(logprobs))


def measure(url: str, tokens: list[int], prompt: str) -> Measured:
    client = OpenAI(base_url=f"{url}/v1", api_key="none", timeout=None, max_retries=0)

    with working("asking: it reads the text and the question") as progress:
        start = time.monotonic()
        first_token_s, answer, prompt_tokens = math.nan, "", 0
        for event in client.chat.completions.create(
            model="smollm2",
            messages=[{"role": "user", "content": prompt}],
            max_tokens=24,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        ):
            if event.usage:
                prompt_tokens = event.usage.prompt_tokens
            for choice in event.choices:
                if choice.delta.content:
                    if not answer:
                        first_token_s = time.monotonic() - start
                    answer += choice.delta.content
                    shown = f"first token after {first_token_s:.1f} s: {answer!r}"
                    progress.update(progress.task_ids[0], description=shown)

    with working(f"scoring the {len(tokens):,} tokens of the text"):
        scored = client.completions.create(
            model="smollm2", prompt=tokens, max_tokens=1, extra_body={"prompt_logprobs": 0}
        )
    # One entry a token, keyed by the token's id; the first token has none.
    entries = scored.choices[0].model_extra["prompt_logprobs"][1:]
    logprobs = [
        entry[str(token)]["logprob"] for token, entry in zip(tokens[1:], entries, strict=True)
    ]
    return Measured(
        prompt_tokens=prompt_tokens,
        first_token_s=first_token_s,
        answer=answer.strip(),
        inside=perplexity(logprobs[WINDOW - TAIL : WINDOW]),
        beyond=perplexity(logprobs[-TAIL:]),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", default="http://localhost:8000", help="the server with DCA")
    parser.add_argument("--tokens", type=int, default=12_000, help="length of the text")
    options = parser.parse_args()

    if not MODEL.exists():
        demo_model.convert(MODEL)
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    tokens = tokenizer.encode(corpus.load()).ids[: options.tokens]
    text = tokenizer.decode(tokens)
    early = text.index("\n\n", len(text) // 10)
    prompt = f"{text[:early]}\n\n{FACT}{text[early:]}\n\n{QUESTION}"

    console.print(
        f"The first {options.tokens:,} tokens of Pride and Prejudice, for a model with a "
        f"window of {WINDOW:,}; hidden in them: “{FACT}”"
    )
    console.rule("Dual Chunk Attention")
    with server(options.url):
        dca = measure(options.url, tokens, prompt)
    console.rule("Plain attention")
    with server(PLAIN_URL, *PLAIN_ARGUMENTS):
        plain = measure(PLAIN_URL, tokens, prompt)

    table = Table("", "plain attention", "Dual Chunk Attention")
    for label, row in (
        (f"perplexity, tokens {WINDOW - TAIL:,} to {WINDOW:,}", lambda m: f"{m.inside:.1f}"),
        (f"perplexity, the last {TAIL:,} tokens", lambda m: f"{m.beyond:.1f}"),
        (QUESTION, lambda m: m.answer),
        ("right?", lambda m: "yes" if CODE in m.answer else "no"),
        ("tokens in the question's prompt", lambda m: f"{m.prompt_tokens:,}"),
        ("time to the first token", lambda m: f"{m.first_token_s:.1f} s"),
    ):
        table.add_row(label, row(plain), row(dca))
    console.print(table)

    ratio = plain.beyond / dca.beyond
    console.print(
        f"At the end of the text, plain attention's perplexity is {ratio:.1f} times DCA's."
    )
    if ratio < 10:
        sys.exit("Expected at least 10 times: see the table for what was measured.")


if __name__ == "__main__":
    main()
