"""Perplexity and retrieval from one trained window to sixteen, in one read of each text.

Numbers are hidden in a long text, as `scripts.quality.retrieval` hides them. The engine reads
it from one length to the next, with what came before in its cache. At each length come the
perplexity of the tokens since the last one, and the answers to the questions for every number
so far. So each method reads a text once, in a quarter of an hour or more.

Methods are NAME or NAME:OPTION=NUMBER,...: plain, yarn, dynamic, dca, dca+yarn; see methods.py.
With --output, the record is written after each text, and what is there already is kept: the
same command goes on where it ended, and another one adds methods and texts.
"""

import itertools
import json
import math
import shlex
import time
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import typer
from rich.progress import track
from rich.table import Table

from scripts.common import corpus, record
from scripts.quality import methods, retrieval, study
from scripts.quality.methods import Method
from scripts.quality.perplexity import BUCKET, nll
from scripts.quality.study import K

LENGTHS = (8 * K, 16 * K, 32 * K, 64 * K, 96 * K, 128 * K)


def read(
    llm: Any, tokenizer: Any, haystack: tuple[list[int], Any], ends: list[int], label: str
) -> dict[str, Any]:
    """One text to each length in turn.

    Args:
        llm: the engine; what it has cached is forgotten.
        tokenizer: the model's.
        haystack: the text's tokens and its needles, as `retrieval.haystack` makes them.
        ends: lengths, multiples of BUCKET and of a block of the cache.
        label: of the progress.

    Returns:
        nll: mean of each BUCKET of tokens; of the first bucket after a length without its first
            token, as `perplexity.nll` leaves it out.
        answers: at each length, as `retrieval.ask` returns them.
    """
    text, needles = haystack
    llm.reset_prefix_cache()
    scores: list[float] = []
    answers: list[dict[str, Any]] = []
    for before, end in track([*itertools.pairwise([0, *ends])], label):
        scores += nll(llm, text[:end], cached=before)
        answers += retrieval.ask(llm, tokenizer, text, needles, end, cached=True)
    return {"nll": scores, "answers": answers}


def by_length(
    found: list[dict[str, Any]], ends: list[int]
) -> dict[int, tuple[float, int, int]]:
    """Of what was read of each text: perplexity since the length before, found, asked."""
    result = {}
    for before, end in itertools.pairwise([0, *ends]):
        span = slice(before // BUCKET, end // BUCKET)
        scores = [score for of in found for score in of["nll"][span]]
        right = [
            answer["right"]
            for of in found
            for answer in of["answers"]
            if answer["length"] == end
        ]
        result[end] = (math.exp(fmean(scores)), sum(right), len(right))
    return result


def main(
    model: Annotated[Path, typer.Argument(help="A directory.")] = study.DEMO_MODEL,
    method: Annotated[str, typer.Option(help="Methods, spaces between.")] = methods.DEFAULT,
    lengths: Annotated[str, typer.Option(help="Tokens.")] = " ".join(map(str, LENGTHS)),
    spacing: Annotated[int, typer.Option(help="Tokens between two numbers.")] = 16 * K,
    text: Annotated[str, typer.Option(help="Works, or text files.")] = " ".join(corpus.WORKS),
    dtype: str = "bfloat16",
    engine_option: Annotated[str, typer.Option(help="JSON: other EngineArgs of vLLM.")] = "{}",
    output: Annotated[Path | None, typer.Option(help="A record as JSON.")] = None,
) -> None:
    ends = sorted(int(length) for length in lengths.split())
    if any(end % BUCKET for end in ends):
        raise typer.BadParameter(f"lengths must be multiples of {BUCKET}")
    if ends[0] < spacing // 8 + 128:
        raise typer.BadParameter(f"with numbers {spacing} apart, {ends[0]} tokens hide none")
    methods.prepare_environment()
    tokenizer = study.tokenizer_of(model)
    haystacks = {
        work: retrieval.haystack(tokens, tokenizer, ends[-1], spacing, seed=0)
        for work, tokens in study.works(text, tokenizer).items()
    }
    for work, (tokens, _) in haystacks.items():
        if len(tokens) < ends[-1]:
            raise typer.BadParameter(f"{work} has {len(tokens)} tokens, not {ends[-1]}")
    engine_options = {"dtype": dtype, "enforce_eager": True, **json.loads(engine_option)}
    asked = {"lengths": ends, "spacing": spacing, "bucket": BUCKET}
    growing = record.Growing(output, {"model": model.name, "engine": engine_options, **asked})
    for each in [Method.parse(label) for label in shlex.split(method)]:
        wanted = [work for work in haystacks if work not in growing.results.get(each.label, {})]
        if not wanted:
            continue
        facts = record.provenance("vllm", "vllm-dca", "transformers")
        with methods.engine(model, each, ends[-1] + K, **engine_options) as (llm, backend):
            for work in wanted:
                started = time.perf_counter()
                found = read(llm, tokenizer, haystacks[work], ends, f"{each.label}: {work}")
                seconds = round(time.perf_counter() - started)
                run = {**facts, "backend": backend, "seconds": seconds}
                growing.add(each.label, work, {**found, "run": run})

    table = Table("", "texts", *(f"{end:,}" for end in ends))
    for label, of_works in growing.results.items():
        of_ends = by_length([*of_works.values()], ends).values()
        cells = (f"{ppl:.1f}, {right} of {of}" for ppl, right, of in of_ends)
        table.add_row(label, f"{len(of_works)}", *cells)
    study.console.print(table)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, rich_markup_mode="markdown")
    app.command(help=__doc__)(main)
    app()
