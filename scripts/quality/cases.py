"""Try each path on thousands of random batches against the fp64 reference.

Dense and sparse attention on the CPU, both compiled and in torch, and CUDA's kernels. The cases
are those of each path's tests, --cases of each path: batches of every shape, what must not be
read poisoned with NaN. They come in rounds, each with a seed of its own, from --seed on. What
fails is shown as small as it can be made, with the command that repeats it. --minutes ends a
path sooner, after a round. With --output there is a record.
"""

import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from scripts.common import record

CPU, CUDA = "tests/cpu/test_attention.py", "tests/cuda"
SPARSE = ("test_attends_to_given_lines", "test_weighs_lines", "test_selects_as_specified")
PATHS = {
    "dense": (f"{CPU}::test_every_path_agrees_with_reference",),
    "sparse": tuple(f"tests/cpu/test_sparse.py::{name}" for name in SPARSE),
    "cuda": (
        f"{CUDA}/test_decode.py::test_decode_agrees_with_reference",
        f"{CUDA}/test_prefill.py::test_prefill_agrees_with_reference",
        f"{CUDA}/test_decode.py::test_decode_takes_any_number_of_new_tokens",
    ),
    "cuda-sparse": tuple(f"{CUDA}/test_sparse_prefill.py::{name}" for name in SPARSE),
}
console = Console()


def tried(tests: tuple[str, ...], seed: int, each: int) -> tuple[int, str]:
    """Passing cases of one round, and what pytest says if one failed, or if there were none."""
    options = ("-q", "--hypothesis-show-statistics", "-p", "no:cacheprovider")
    command = [sys.executable, "-m", "pytest", *tests, *options, f"--hypothesis-seed={seed}"]
    found = subprocess.run(
        command,
        cwd=record.ROOT,
        env={**os.environ, "DCA_CASES": str(each)},
        text=True,
        capture_output=True,
    )
    passing = sum(map(int, re.findall(r"- (\d+) passing\b", found.stdout)))
    failed = found.returncode != 0 or not passing
    return passing, found.stdout + found.stderr if failed else ""


def main(
    path: Annotated[str, typer.Option(help="Paths, spaces between.")] = " ".join(PATHS),
    cases: Annotated[int, typer.Option(help="Of each path.")] = 10_000,
    seed: int = 0,
    each: Annotated[int, typer.Option(help="Cases of a test in a round.")] = 500,
    minutes: Annotated[float, typer.Option(help="For each path, or 0: no end.")] = 0,
    output: Annotated[Path | None, typer.Option(help="A record as JSON.")] = None,
) -> None:
    paths = path.split()
    if unknown := {*paths} - {*PATHS}:
        raise typer.BadParameter(f"no path {', '.join(unknown)}: there is {', '.join(PATHS)}")
    growing = record.Growing(output, {"seed": seed, "wanted": cases})
    facts = record.provenance("hypothesis", "triton", "numpy")
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    failed = []
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        for name in paths:
            shown = progress.add_task(name, total=cases)
            started, done, number = time.monotonic(), 0, seed
            while done < cases and not (minutes and time.monotonic() - started > 60 * minutes):
                passing, failure = tried(PATHS[name], number, each)
                if failure:
                    again = shlex.join(["pytest", *PATHS[name], f"--hypothesis-seed={number}"])
                    console.print(failure, markup=False, highlight=False)
                    failed.append(f"DCA_CASES={each} {again}")
                    break
                done, number = done + passing, number + 1
                progress.update(shown, completed=done)
                seconds = round(time.monotonic() - started)
                found = {
                    "cases": done,
                    "seconds": seconds,
                    "last_seed": number - 1,
                    "each": each,
                }
                growing.add(name, "passed", {**found, "run": facts})
    for again in failed:
        console.print(f"FAILED, again by: {again}", markup=False, soft_wrap=True)
    raise typer.Exit(bool(failed))


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, rich_markup_mode="markdown")
    app.command(help=__doc__)(main)
    app()
