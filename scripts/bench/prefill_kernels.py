"""A prefill in one launch beside three passes and a merge, as the compiler has them.

Usage: python -m scripts.bench.prefill_kernels [--output FILE]

Needs no GPU, and none of it is a time: registers, spills, shared memory, programs that fit a
multiprocessor, instructions of the loop over keys, and bytes that launches hand to one another
(`scripts.bench.moves`). For heads of 64, 128 and 256 entries.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

# First: it decides whether Triton compiles.
from scripts.bench import compile_kernels  # isort: skip
from scripts.bench import launches, machine_code, moves
from scripts.common import record

SHAPES = ("SmolLM2-135M", "Llama-3-8B", "Gemma-like")
KERNELS = {"prefill_kernel": "one launch", "attention_kernel, causal False": "passes"}
# New tokens, all of three regions.
TOKENS = 8192


def rows(capability: int, shape: launches.Shape, dtype: Any, cache: Any) -> list[Any]:
    with compile_kernels.Compiler(capability) as compiler:
        launches.prefill(shape, dtype, cache)
        launches.passes(shape, dtype, cache, masks=(False,))
    ways = {"one launch": moves.by_one_launch(3), "passes": moves.by_passes(3)}
    found = []
    for kernel, way in KERNELS.items():
        compiled = compiler.kernels[kernel]
        loop = machine_code.loop_of(machine_code.dumped(compiled.asm["cubin"], "-sass"))
        found.append(
            {
                "capability": capability,
                "shape": shape.name,
                "head_size": shape.head_size,
                "kv_cache": launches.name_of(cache),
                "way": way,
                "launches": ways[way].launches,
                **compile_kernels.resources(compiled, capability),
                "loop_instructions": loop.instructions,
                "loop_products": loop.products,
                "handed_over_bytes": ways[way].moved(TOKENS, shape.heads, shape.head_size),
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    journal = record.Journal(args.output, record.provenance("triton") | {"tokens": TOKENS})
    for capability in compile_kernels.WITHOUT_SPILLS:
        for shape in launches.SHAPES:
            if shape.name in SHAPES:
                for cache in (torch.bfloat16, torch.float8_e5m2):
                    for row in rows(capability, shape, torch.bfloat16, cache):
                        journal.add(row)
    table = Table(*journal.results[0])
    for row in journal.results:
        table.add_row(*map(str, row.values()))
    Console(width=160).print(table)
    journal.end()


if __name__ == "__main__":
    main()
