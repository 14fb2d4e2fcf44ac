"""What sparse prefill loses and saves: perplexity, retrieval, keys kept and time of one run.

Numbers are hidden in a long text, as `scripts.quality.retrieval` hides them. What lies below
the threshold is dense in any case, and read once. The rest is read once in each way:

- dense;
- `auto` at some coverages;
- `window`: in each head and segment as many keys as `auto` keeps, but the first 64 and the
  nearest ones. This is no setting: the engine is as for `auto`, and its selection is replaced.

From the same read come the perplexity of the tokens past the threshold, the shares of keys and
of attention that were kept there, the processor time that attention took, and the read's time:
with that of what lies below the threshold, a prompt's first token took so long. Then the model
is asked for each number; its cached keys are those of that read.

With --output, the record is written after each read, and what is there already is kept. With
--minutes, the command ends before a read that would take it longer; the same command goes on.
"""

import functools
import math
import os
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from scripts.common import corpus, record
from scripts.quality import kept, loss, methods, retrieval, study
from scripts.quality.kept import Selection
from scripts.quality.methods import Method
from scripts.quality.perplexity import BUCKET, nll
from scripts.quality.study import K

WAYS = "dense auto:0.95 auto:0.7 auto:0.85 window:0.7 window:0.85 window:0.95"


class Reader:
    """One text through one engine, in several ways."""

    def __init__(self, llm: Any, tokenizer: Any, text: list[int], needles: Any, threshold: int):
        self.llm, self.tokenizer, self.text, self.needles = llm, tokenizer, text, needles
        self.threshold = threshold
        core = llm.llm_engine.engine_core.engine_core
        self.pool = core.scheduler.kv_cache_manager.block_pool
        llm.reset_prefix_cache()
        started = time.perf_counter()
        nll(llm, text[: threshold + 1])
        self.seconds_below = round(time.perf_counter() - started, 1)
        self.below = self._cached()

    def _cached(self) -> set[int]:
        return {block.block_id for block in self.pool.blocks if block.block_hash is not None}

    def read(self, selection: Selection) -> dict[str, Any]:
        """What is known of the text past the threshold."""
        self.pool.evict_blocks(self._cached() - self.below)
        self.llm.apply_model(functools.partial(kept.use, label=selection.label))
        started = time.perf_counter()
        # What `retrieval.ask` asks begins with this.
        end = len(self.text) - retrieval.ROOM
        scores = nll(self.llm, self.text[:end], cached=self.threshold)
        seconds = time.perf_counter() - started
        [found] = self.llm.apply_model(kept.kept)
        if ("keys" in found) != (selection.coverage is not None):
            raise RuntimeError(f"{selection.label}: watched was {', '.join(found)}")
        answers = retrieval.ask(
            self.llm, self.tokenizer, self.text, self.needles, len(self.text), cached=True
        )
        times = {"seconds_below": self.seconds_below, "seconds": round(seconds, 1)}
        return {**times, **found, "nll": scores, "answers": answers}


def main(
    model: Annotated[Path, typer.Argument(help="A directory.")] = study.DEMO_MODEL,
    way: Annotated[str, typer.Option(help="dense, auto:SHARE, window:SHARE.")] = WAYS,
    length: Annotated[int, typer.Option(help="Tokens.")] = 16 * K,
    threshold: Annotated[int, typer.Option(help="sparse_threshold.")] = 8 * K,
    text: Annotated[str, typer.Option(help="Works, or text files.")] = " ".join(corpus.WORKS),
    dtype: str = "float32",
    step: Annotated[int, typer.Option(help="max_num_batched_tokens.")] = 2 * K,
    minutes: Annotated[float, typer.Option(help="That this may take.")] = math.inf,
    output: Annotated[Path | None, typer.Option(help="A record as JSON.")] = None,
) -> None:
    started = time.monotonic()
    methods.prepare_environment()
    selections = [Selection.parse(each.replace(":", " ")) for each in way.split()]
    tokenizer = study.tokenizer_of(model)
    spacing = length // len(retrieval.THINGS)
    haystacks = {
        work: retrieval.haystack(tokens, tokenizer, length, spacing, seed=0)
        for work, tokens in study.works(text, tokenizer).items()
    }
    engine_options = {"dtype": dtype, "enforce_eager": True, "max_num_batched_tokens": step}
    asked = {
        "model": model.name,
        "engine": engine_options,
        "length": length,
        "threshold": threshold,
        "spacing": spacing,
        "bucket": BUCKET,
    }
    # A read's blocks are told apart from those below the threshold in this process only.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    document = record.Growing(output, asked)
    wanted = [
        (selection, work)
        for work in haystacks
        for selection in selections
        if work not in document.results.get(selection.label, {})
    ]
    if wanted:
        label = f"dca:sparse_threshold={threshold}"
        facts = record.provenance("vllm", "vllm-dca", "transformers")
        with methods.engine(model, Method.parse(label), length + K, **engine_options) as (
            llm,
            backend,
        ):
            reader, of_reader, longest = None, None, 0.0
            for number, (selection, work) in enumerate(wanted, 1):
                begun = time.monotonic()
                if (begun - started + longest) / 60 > minutes:
                    break
                if reader is None or of_reader != work:
                    reader = Reader(llm, tokenizer, *haystacks[work], threshold)
                    of_reader, begun = work, time.monotonic()
                found = reader.read(selection)
                found["run"] = {**facts, "backend": backend}
                document.add(selection.label, work, found)
                longest = max(longest, time.monotonic() - begun)
                took = found["attention_seconds"]
                print(
                    f"{number} of {len(wanted)}: {selection.label}, {work}: perplexity "
                    f"{loss.perplexity([found]):.2f}, attention {took:.0f} s of processor "
                    f"time; {longest:.0f} s",
                    flush=True,
                )

    shares = ("keys", "recall", "attention's time", "whole read, s")
    table = Table("", "texts", "perplexity", "found", *shares)
    for label, of in loss.losses(document.results).items():
        table.add_row(
            label,
            f"{of.texts}",
            f"{of.perplexity:.2f} ({of.more:+.1%})",
            f"{of.found} of {of.asked}",
            *("" if share is None else f"{share:.3f}" for share in (of.keys, of.recall)),
            f"{of.attention_time:.2f}",
            f"{of.seconds:.0f} ({of.read_time:.2f})",
        )
    study.console.print(table)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, rich_markup_mode="markdown")
    app.command(help=__doc__)(main)
    app()
