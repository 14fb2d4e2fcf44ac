"""Time DCA's compiled kernel by each instruction set of this processor, beside CPU_ATTN.

One layer in one dtype; all take turns. It shows which instructions are worth taking where a
processor has wider ones that are slower (`vllm_dca.cpu.compiled.fastest`). Each answer is
checked against the fp64 reference before it is timed.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated
from unittest import mock

import torch
import typer
from rich.console import Console
from rich.table import Table

from scripts.bench.cpu import CACHED, LOCAL_SIZE, PREFILL, SHAPES, BothLayers, alternate
from scripts.common import record
from vllm_dca.cpu import compiled

# Not decodes: each would find in the processor's cache what the one before it read.
NEW = {"prefill": PREFILL, "cached": CACHED}


def main(
    repeats: Annotated[int, typer.Option(min=3)] = 7,
    context: int = 16384,
    chunk_len: int = 5120,
    dtype: str = "bfloat16",
    output: Annotated[Path | None, typer.Option(help="A record as JSON.")] = None,
) -> None:
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    libraries = {name: compiled.library(name) for name in compiled.instruction_sets()}
    facts = record.provenance("vllm", "vllm-dca") | {"taken": compiled.instructions()}
    columns = [*libraries, "CPU_ATTN"]
    table, rows = Table("step", "shape", *(f"{name}, ms" for name in columns)), []
    for shape, sizes in SHAPES.items():
        for step, new in NEW.items():
            layer = BothLayers(
                (shape, *sizes, chunk_len + LOCAL_SIZE, LOCAL_SIZE), 1, context, new, dtype
            )
            planned = layer.planned(compiled.CompiledPlan, compiled.attention)

            def by(name: str, run: Callable[[], None] = planned) -> Callable[[], None]:
                def by_library() -> None:
                    with mock.patch.object(compiled, "library", return_value=libraries[name]):
                        run()

                return by_library

            runs = {name: by(name) for name in libraries}
            for run in runs.values():
                layer.output.fill_(torch.nan)
                run()
                layer.check()
            times = alternate({**runs, "CPU_ATTN": layer.own}, repeats)
            rows.append({"step": step, "shape": shape, "milliseconds": times})
            table.add_row(step, shape, *(f"{times[name]['median']:.2f}" for name in columns))
            if output:
                record.write(output, {**facts, "dtype": dtype, "results": rows})
    Console().print(table)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, rich_markup_mode="markdown")
    app.command(help=__doc__)(main)
    app()
