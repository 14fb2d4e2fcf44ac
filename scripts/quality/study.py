"""A measurement of several methods through the engine, kept as one JSON record."""

import shlex
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from scripts.common import corpus, record
from scripts.quality import methods
from scripts.quality.methods import Method

K = 1024
DEMO_MODEL = record.ROOT / ".cache/demo-model"
console = Console()


def tokenizer_of(model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


def works(names: str, tokenizer: Any) -> dict[str, list[int]]:
    """Tokens of the works of corpus.py, or of text files, that are named, spaces between."""
    texts = {
        name: corpus.load(name) if name in corpus.WORKS else Path(name).read_text()
        for name in shlex.split(names)
    }
    return {
        name: tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        for name, text in texts.items()
    }


def compare(
    labels: str,
    model: Path,
    length: int,
    engine_options: dict[str, Any],
    asked: dict[str, Any],
    output: Path | None,
    measure: Callable[[str, Any], dict[str, Any]],
) -> dict[str, Any]:
    """Measure each method in an engine of its own.

    Args:
        labels: the methods, spaces between.
        model: a directory.
        length: tokens that the engine must take.
        engine_options: `LLM`'s.
        asked: what else makes the run what it is; kept in the record.
        output: the record. What it has already is kept, if it was asked for in the same way.
        measure: given a method's label and its engine, returns what is kept.

    Returns:
        For each method in the record what `measure` returned.
    """
    chosen = [Method.parse(label) for label in shlex.split(labels)]
    growing = record.Growing(output, {"model": model.name, "engine": engine_options, **asked})
    for method in chosen:
        if method.label in growing.results:
            continue
        facts = record.provenance("vllm", "vllm-dca", "transformers")
        started = time.perf_counter()
        with methods.engine(model, method, length, **engine_options) as (llm, backend):
            found = measure(method.label, llm)
        seconds = round(time.perf_counter() - started)
        run = {**facts, "backend": backend, "seconds": seconds}
        growing.add(method.label, None, {**found, "run": run})
    return growing.results


def show(
    results: dict[str, Any], lengths: Iterable[int], cell: Callable[[dict[str, Any], str], str]
) -> None:
    """A table with a row for each length and a column for each method.

    Args:
        results: as `compare` returns them.
        lengths: tokens.
        cell: given what a method's `measure` returned and a length, what to show.
    """
    table = Table("tokens", *results)
    for length in map(str, lengths):
        table.add_row(length, *(cell(found, length) for found in results.values()))
    console.print(table)
