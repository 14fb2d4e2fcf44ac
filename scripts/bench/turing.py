"""Compile the kernels for compute capability 7.5, which DCA refuses: what it would take.

Usage: python -m scripts.bench.turing [--output FILE]

In fp16, with the tiles that other cards have and with smaller ones. Needs no GPU.
"""

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from scripts.bench import compile_kernels, launches
from scripts.common import record
from vllm_dca.cuda import decode, paged_pass, prefill
from vllm_dca.cuda.tuning import Tuning, decode_tuning, prefill_tuning

CAPABILITY = 75
KERNELS = {"decode": "decode", "attention": "pass", "prefill": "prefill"}


@contextlib.contextmanager
def smaller_tiles() -> Iterator[None]:
    """Sixteen keys for decode; sixteen queries and 32 keys for prefills; eight warps."""

    def of_decode(*of: Any) -> Tuning:
        return decode_tuning(*of)._replace(tile=16, num_warps=8)

    def of_prefill(*of: Any) -> Tuning:
        return prefill_tuning(*of)._replace(queries=16, tile=32, num_warps=8)

    with (
        mock.patch.object(decode, "decode_tuning", of_decode),
        mock.patch.object(paged_pass, "prefill_tuning", of_prefill),
        mock.patch.object(prefill, "prefill_tuning", of_prefill),
    ):
        yield


def compiled(tiles: str) -> Iterator[dict[str, Any]]:
    for shape in launches.SHAPES:
        with compile_kernels.Compiler(CAPABILITY) as compiler:
            launches.every(shape, *[torch.float16] * 2)
        for kernel, found in compiler.kernels.items():
            kind = KERNELS.get(kernel.partition("_")[0])
            if kind is not None:
                yield {
                    "kernel": kind,
                    "tiles": tiles,
                    "shape": shape.name,
                    **compile_kernels.resources(found, CAPABILITY),
                    "tensor_core_instructions": found.asm["ptx"].count("mma.sync"),
                }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    results = [*compiled("other cards'")]
    with smaller_tiles():
        results += compiled("smaller")
    for row in results:
        print(row)
    if args.output:
        record.write_kernels(args.output, results, record.provenance("triton"))


if __name__ == "__main__":
    main()
