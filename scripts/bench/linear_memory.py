"""What vLLM's linear layers keep on the CPU, apart from any attention.

oneDNN, which they call (`onednn_mm`), compiles a kernel for each number of tokens that a step
brings and each shape of matrix, and keeps it. The demo model's four shapes get many numbers of
tokens, each once; beside it the same by torch's `linear`, and with fewer kernels kept.
Memory is the process's, in MiB.
"""

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import psutil
import torch
import typer
from rich.console import Console
from rich.table import Table

from scripts.common import record

SHAPES = ((960, 576), (576, 576), (3072, 576), (576, 1536))  # rows, columns
MOST = 2048  # tokens of a step
REPORTED = (1, 100, 200, 400, 800, 1200, 1600)  # numbers of tokens so far
CAPACITY = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
WAYS = {"onednn_mm": {}, f"onednn_mm, {CAPACITY}=64": {CAPACITY: "64"}, "linear": {}}


def measure(way: str) -> list[int]:
    """The memory after each of REPORTED."""
    from vllm import _custom_ops as ops
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    weights = [torch.randn(shape) for shape in SHAPES]
    handlers = [ops.create_onednn_mm(weight.t(), 32) for weight in weights]
    found = []
    for count, tokens in enumerate(
        random.Random(0).sample(range(1, MOST + 1), REPORTED[-1]), 1
    ):
        for weight, handler in zip(weights, handlers, strict=True):
            x = torch.randn(tokens, weight.shape[1])
            if way == "linear":
                torch.nn.functional.linear(x, weight)
            else:
                ops.onednn_mm(handler, x, None)
        if count in REPORTED:
            found.append(psutil.Process().memory_info().rss >> 20)
    return found


def main(
    way: Annotated[str | None, typer.Option(help="This one alone, in this process.")] = None,
    output: Annotated[Path | None, typer.Option(help="A record as JSON.")] = None,
) -> None:
    if way:
        print(*measure(way))
        return
    results = {}
    for name, environment in WAYS.items():
        command = [sys.executable, "-m", "scripts.bench.linear_memory", "--way", name]
        child = subprocess.run(
            command, env={**os.environ, **environment}, stdout=subprocess.PIPE, check=True
        )
        results[name] = list(map(int, child.stdout.split()[-len(REPORTED) :]))
    table = Table("numbers of tokens", *map(str, REPORTED))
    for name, found in results.items():
        table.add_row(name, *map(str, found))
    Console().print(table)
    if output:
        facts = record.provenance("vllm")
        record.write(output, {**facts, "numbers": REPORTED, "mebibytes": results})


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, rich_markup_mode="markdown")
    app.command(help=__doc__)(main)
    app()
