"""Compile the Triton kernels ahead of time, without a GPU, and report what they use.

Usage: python -m scripts.bench.compile_kernels [--quick] [--shapes NAME ...]
           [--capabilities N ...] [--dtypes NAME ...] [--parts NAME ...]
           [--kernels NAME ...] [--jobs N] [--output FILE]

Fails if a kernel wants more shared memory than its card has, or spills registers on a data
centre's card. The launches are the project's own, of the shapes that are common; only the last
step, running them, is left out. None of what it reports is a time.

All of it takes one core several hours. So it may be done in parts: FILE keeps its rows of other
shapes, cards, dtypes, parts and kernels, each with the commit that it was compiled from, and is
written after each shape and card. Triton keeps what it compiled (TRITON_CACHE_DIR): what has
not changed since is not compiled again.

What is in flight is read from the compiler's output: how many asynchronous copies the loop's
wait leaves under way, times what one of them holds.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from scripts.bench import launches, machine_code
from scripts.bench.launches import name_of
from scripts.common import record

# Bytes of shared memory that a block may have at most, by compute capability (CUDA programming
# guide, appendix on compute capabilities).
SHARED_MEMORY = {
    80: 163 << 10,
    86: 99 << 10,
    89: 99 << 10,
    90: 227 << 10,
    100: 227 << 10,
    120: 99 << 10,
}
# Of a multiprocessor, in all; each program wants 1 KiB of it beside its own.
SHARED_MEMORY_IN_ALL = {
    75: 64 << 10,
    80: 164 << 10,
    86: 100 << 10,
    89: 100 << 10,
    90: 228 << 10,
    100: 228 << 10,
    120: 100 << 10,
}
# Those for which the kernels' tiles were chosen. The others are there for their shared memory.
WITHOUT_SPILLS = (80, 90, 100)
# Kernels of prefill and decode, and those that sparse prefill has besides.
PARTS = {"dense": launches.every, "sparse": launches.sparse}
OF_DENSE = ("turn", "attention", "merge", "prefill", "plan", "decode", "reduce")
OF_SPARSE = ("normalise", "weigh", "choose", "list", "attend")
# What --quick compiles for: data centres' cards with the least and the most room.
QUICK = (80, 90)
ALL = [*launches.SHAPES, *launches.WITH_MORE]
DTYPES = [name_of(dtype) for dtype in launches.DTYPES]
BYTES = {"bf16": 2, "f16": 2, "f32": 4, "f8E5M2": 1, "f8E4M3FN": 1}
WARPS_PER_MULTIPROCESSOR = {75: 32, 80: 64, 86: 48, 89: 48, 90: 64, 100: 64, 120: 48}


class Compiler:
    """Stands in for the driver of a card that is not there; launches compile and stop.

    Those of kernels that are not wanted do nothing.
    """

    def __init__(
        self, capability: int, wanted: Sequence[str] = (*OF_DENSE, *OF_SPARSE)
    ) -> None:
        self.wanted = wanted
        self.target = GPUTarget("cuda", capability, 32)
        self.kernels: dict[str, object] = {}
        triton.runtime.driver.set_active(
            SimpleNamespace(
                get_current_target=lambda: self.target,
                get_current_device=lambda: capability,
                get_current_stream=lambda device: 0,
            )
        )

    def __enter__(self) -> "Compiler":
        self.run = run = JITFunction.run

        def compile_only(function, *args, grid, warmup, **kwargs):
            name = function.fn.__name__.strip("_")
            if name.partition("_")[0] not in self.wanted:
                return
            kernel = run(function, *args, grid=grid, warmup=True, **kwargs)
            if "CAUSAL" in kwargs:
                name += f", causal {kwargs['CAUSAL']}"
            if name in ("weigh_kernel", "choose_kernel"):
                name += f", {'diagonals' if kwargs['WIDTH'] == 1 else 'blocks'}"
            if name == "decode_kernel":
                name += f", {kwargs['QUERIES']} queries"
            self.kernels[name] = kernel

        JITFunction.run = compile_only
        return self

    def __exit__(self, *exception: object) -> None:
        JITFunction.run = self.run


def resources(kernel, capability: int) -> dict[str, int]:
    """What the machine code uses, as cuobjdump reads it, and what that leaves room for."""
    usage = machine_code.dumped(kernel.asm["cubin"], "--dump-resource-usage")
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    warps, shared = kernel.metadata.num_warps, kernel.metadata.shared
    registers_of_a_warp = 32 * (-(-found["REG"] // 8) * 8)
    return {
        "registers": found["REG"],
        "spilled_bytes": found["STACK"] + found["LOCAL"],
        "shared_bytes": shared,
        "warps": warps,
        "programs_per_multiprocessor": min(
            WARPS_PER_MULTIPROCESSOR[capability] // warps,
            (1 << 16) // (registers_of_a_warp * warps),
            SHARED_MEMORY_IN_ALL[capability] // (shared + 1024),
        ),
        "bytes_in_flight": in_flight(kernel.asm["ttgir"], kernel.asm["ptx"]),
    }


def in_flight(layouts: str, instructions: str) -> int:
    """Bytes that a program's asynchronous copies still bring while it waits for a tile."""
    waits = [
        int(number) for number in re.findall(r"cp\.async\.wait_group\s+(\d+)", instructions)
    ]
    buffers = re.findall(
        r"local_alloc : \(\) -> !ttg\.memdesc<(\d+)x(\d+)x(\d+)x(\w+)", layouts
    )
    if not buffers:
        return 0
    sizes = [int(rows) * int(columns) * BYTES[kind] for _, rows, columns, kind in buffers]
    # A group of copies is a tile of keys, or one of values.
    return max(waits, default=0) * max(sizes)


def has_part(part: str, shape: launches.Shape, dtype: Any) -> bool:
    """Sparse prefill refuses fp32, soft caps and sinks."""
    is_plain = shape.soft_cap is None and not shape.has_sinks and dtype != torch.float32
    return part == "dense" or is_plain


def compiled(
    capability: int,
    shape: launches.Shape,
    dtypes: list[Any],
    part: str = "dense",
    wanted: Sequence[str] = (*OF_DENSE, *OF_SPARSE),
) -> list[Any]:
    """A row for each kernel of a part that is wanted, of a shape on a card."""
    of_part = {"dense": OF_DENSE, "sparse": OF_SPARSE}[part]
    wanted = [name for name in wanted if name in of_part]
    rows = []
    for dtype, cache in dtypes:
        if not wanted or not has_part(part, shape, dtype):
            continue
        with Compiler(capability, wanted) as compiler:
            PARTS[part](shape, dtype, cache)
        rows += [
            {
                "capability": capability,
                "shape": shape.name,
                "dtype": name_of(dtype),
                "kv_cache": name_of(cache),
                "part": part,
                "kernel": kernel,
                **resources(found, capability),
            }
            for kernel, found in compiler.kernels.items()
        ]
    return rows


def quick(card: int) -> list[tuple[Any, ...]]:
    """The first shape; for one card the largest in fp32, what is rare, and sparse prefill.

    fp16 has bf16's tiles. Either card has one of the two FP8 caches.
    """
    first, largest = launches.SHAPES[:2]
    half, single = launches.DTYPES[0], launches.DTYPES[-1]
    *_, fp8 = launches.dtypes_of(card)
    if card != QUICK[0]:
        return [(card, first, [(half, half), fp8])]
    *some, wide, odd = launches.WITH_MORE
    return [
        *((card, shape, [(half, half)]) for shape in (first, *some)),
        *((card, shape, [(single, single)]) for shape in (largest, odd)),
        (card, wide, [fp8]),
        (card, first, [(half, half)], "sparse"),
    ]


def results_of(tasks: list[tuple[Any, ...]], jobs: int) -> Iterable[list[Any]]:
    if jobs == 1:
        yield from itertools.starmap(compiled, tasks)
        return
    # A compiler stands in for its process's driver.
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        yield from (done.result() for done in [pool.submit(compiled, *task) for task in tasks])


def write(output: Path, results: list[Any], whole: bool) -> None:
    """What was compiled now, and in their places other rows that are there already.

    Several commands may write it at once.

    Args:
        output: the record.
        results: rows.
        whole: whether each case has all of its kernels, and others on record are no more.
    """
    cards, names = list(SHARED_MEMORY), [shape.name for shape in ALL]

    def place(row: dict[str, Any]) -> tuple[int, ...]:
        dtype = DTYPES.index(row["dtype"])
        part = [*PARTS].index(row.get("part", "dense"))
        return cards.index(row["capability"]), names.index(row["shape"]), dtype, part

    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        return *place(row), row["kv_cache"], row["kernel"]

    done = {place(row) for row in results} if whole else set()
    facts = record.provenance("triton")
    commit = facts["commit"]
    with record.alone(output):
        found = {"runs": {}, "kernels": []}
        if output.exists():
            found = json.loads(output.read_text())
        by_key = {key(row): row for row in found["kernels"] if place(row) not in done}
        by_key |= {key(row): {**row, "commit": commit} for row in results}
        rows = sorted(by_key.values(), key=place)
        runs = found["runs"] | {commit: facts}
        kept = {row["commit"]: runs[row["commit"]] for row in rows}
        record.write_kernels(output, rows, {"runs": kept})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick",
        action="store_true",
        help="two cards: the first shape; for one, some more",
    )
    names = [shape.name for shape in ALL]
    parser.add_argument("--shapes", nargs="+", choices=names, default=names)
    cards = list(SHARED_MEMORY)
    parser.add_argument("--capabilities", nargs="+", type=int, choices=cards, default=cards)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[*PARTS])
    every = [*OF_DENSE, *OF_SPARSE]
    parser.add_argument("--kernels", nargs="+", choices=every, default=every)
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    if args.quick:
        tasks = [task for card in QUICK for task in quick(card)]
    else:
        wanted = [shape for shape in ALL if shape.name in args.shapes]
        tasks = [
            (card, shape, dtypes, part, args.kernels)
            for part, card, shape in itertools.product(args.parts, args.capabilities, wanted)
            for dtypes in [launches.dtypes_of(card, args.dtypes)]
        ]
    results: list[Any] = []
    for rows in results_of(tasks, args.jobs):
        results += rows
        if args.output:
            write(args.output, results, whole=args.kernels == every)
    table = Table(*results[0])
    for row in results:
        table.add_row(*map(str, row.values()))
    Console(width=140).print(table)
    spilled = [
        row for row in results if row["spilled_bytes"] and row["capability"] in WITHOUT_SPILLS
    ]
    assert not spilled, f"registers spill: {spilled}"
    large = [row for row in results if row["shared_bytes"] > SHARED_MEMORY[row["capability"]]]
    assert not large, f"more shared memory than there is: {large}"


if __name__ == "__main__":
    main()
