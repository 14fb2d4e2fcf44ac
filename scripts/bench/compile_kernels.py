"""Compile the Triton kernels ahead of time, without a GPU, and report what they use.

Usage: python -m scripts.bench.compile_kernels [--quick] [--shapes NAME ...] [--output FILE]

Fails if a kernel wants more shared memory than its card has, or spills registers on a data
centre's card. The launches are the project's own, of the shapes that are common; only the last
step, running them, is left out. None of what it reports is a time.

What is in flight is read from the compiler's output: how many asynchronous copies the loop's
wait leaves under way, times what one of them holds.
"""

import argparse
import dataclasses
import os
import re
import subprocess
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from scripts.common import record
from vllm_dca.cuda.decode import decode_attention
from vllm_dca.cuda.merge import merge_parts
from vllm_dca.cuda.paged_pass import attention
from vllm_dca.cuda.plan_decode import DecodePlanner, programs, rows_a_pack
from vllm_dca.cuda.turn import turn_queries
from vllm_dca.method.device import Partial
from vllm_dca.method.geometry import ChunkGeometry
from vllm_dca.method.kv_cache import split_kv
from vllm_dca.method.planning import plan_prefill
from vllm_dca.method.rotary import QueryRotation

# Bytes of shared memory that a block may have at most, by compute capability (CUDA programming
# guide, appendix on compute capabilities). 8.9 and 12.0 have what 8.6 has.
SHARED_MEMORY = {80: 163 << 10, 86: 99 << 10, 90: 227 << 10, 100: 227 << 10}
# Of a multiprocessor, in all; each program wants 1 KiB of it beside its own.
SHARED_MEMORY_IN_ALL = {
    75: 64 << 10,
    80: 164 << 10,
    86: 100 << 10,
    90: 228 << 10,
    100: 228 << 10,
}
# Those for which the kernels' tiles were chosen. 8.6 is there for its shared memory.
WITHOUT_SPILLS = (80, 90, 100)
# What --quick compiles for: data centres' cards with the least and the most room.
QUICK = (80, 90)


class Shape(NamedTuple):
    """Of a layer: what its kernels are compiled for."""

    name: str
    heads: int
    kv_heads: int
    head_size: int
    soft_cap: float | None = None
    has_sinks: bool = False


SHAPES = [
    Shape("Llama-3-8B", 32, 8, 128),
    Shape("MQA", 48, 1, 256),
    Shape("Qwen2.5-7B", 28, 4, 128),
    Shape("Llama-2-7B", 32, 32, 128),
    Shape("SmolLM2-135M", 9, 3, 64),
    Shape("Gemma-like", 8, 4, 256),
    Shape("Phi-like", 32, 32, 80),
]
# What few models have, and other kernels are compiled for.
WITH_MORE = [
    Shape("Gemma-2", 16, 8, 256, soft_cap=50.0),
    Shape("gpt-oss", 64, 8, 64, has_sinks=True),
]
BYTES = {"bf16": 2, "f16": 2, "f32": 4, "f8E5M2": 1, "f8E4M3FN": 1}
WARPS_PER_MULTIPROCESSOR = {75: 32, 80: 64, 86: 48, 90: 64, 100: 64}
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Compiler:
    """Stands in for the driver of a card that is not there; launches compile and stop."""

    def __init__(self, capability: int) -> None:
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
            kernel = run(function, *args, grid=grid, warmup=True, **kwargs)
            name = function.fn.__name__.strip("_")
            if "CAUSAL" in kwargs:
                name += f", causal {kwargs['CAUSAL']}"
            if name == "decode_kernel":
                name += f", {kwargs['QUERIES']} queries"
            self.kernels[name] = kernel

        JITFunction.run = compile_only
        return self

    def __exit__(self, *exception: object) -> None:
        JITFunction.run = self.run


def launch(shape: Shape, dtype: torch.dtype, cache: torch.dtype):
    """Every kernel once, as the backend launches it."""
    _, heads, kv_heads, head_size, soft_cap, has_sinks = shape
    sinks = torch.zeros(heads, dtype=dtype) if has_sinks else None
    rows, page = 4, 16
    query = torch.zeros(rows, heads, head_size, dtype=dtype)
    rotation = QueryRotation(torch.zeros(64, head_size), True)
    indices = torch.zeros(rows, dtype=torch.int32)
    turn_queries(query, rotation, indices, indices)
    lse = torch.zeros(heads, rows)
    part = Partial(query, lse, indices, indices)
    merge_parts(query, lse, [part, part], sinks)
    kv_cache = torch.zeros(2, kv_heads, page, 2 * head_size, dtype=cache)
    scale = torch.ones(1) if cache != dtype else None
    key_cache, value_cache = split_kv(kv_cache)
    geometry = ChunkGeometry(6144, 1024)
    table = indices[:, None]
    starts = torch.arange(rows + 1, dtype=torch.int32)
    prefill = plan_prefill(starts.numpy(), starts[1:].numpy(), table, page, geometry)
    for causal in (True, False):
        attention(
            query,
            key_cache,
            value_cache,
            torch.empty_like(query),
            segments=dataclasses.replace(prefill.passes[0], causal=causal),
            softmax_scale=0.1,
            soft_cap=soft_cap,
            k_scale=scale,
            v_scale=scale,
        )
    group = heads // kv_heads
    # A row a request, and as many as stand in one tile.
    for rows in (1, 2 * rows_a_pack(group)):
        query = torch.zeros(rows, heads, head_size, dtype=dtype)
        planner = DecodePlanner(geometry, None, rows, group, programs(132), query.device)
        decode_attention(
            query,
            kv_cache,
            torch.empty_like(query),
            plan=planner.plan(starts[:2], starts[:1], table, rows),
            rotation=rotation,
            softmax_scale=0.1,
            soft_cap=soft_cap,
            sinks=sinks,
            k_scale=scale,
            v_scale=scale,
        )


def resources(kernel, capability: int) -> dict[str, int]:
    """What the machine code uses, as cuobjdump reads it, and what that leaves room for."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        usage = subprocess.check_output(
            [BINARIES / "cuobjdump", "--dump-resource-usage", cubin.name], text=True
        )
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick",
        action="store_true",
        help="two cards, the first shape, the largest in fp32, a cap and sinks in bf16",
    )
    parser.add_argument("--shapes", nargs="+", help="some of them; else all")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    shapes = [*SHAPES[: 2 if args.quick else None], *WITH_MORE]
    if args.shapes:
        shapes = [shape for shape in [*SHAPES, *WITH_MORE] if shape.name in args.shapes]
    results = []
    for capability in QUICK if args.quick else SHARED_MEMORY:
        fp8 = [torch.float8_e5m2] + [torch.float8_e4m3fn] * (capability >= 90)
        dtypes = [(d, d) for d in DTYPES] + [(torch.bfloat16, c) for c in fp8]
        for shape in shapes:
            if args.quick and shape.name == "MQA":
                dtypes = [(torch.float32, torch.float32)]
            if args.quick and shape in WITH_MORE:
                dtypes = [(torch.bfloat16, torch.bfloat16)]
            for dtype, cache in dtypes:
                with Compiler(capability) as compiler:
                    launch(shape, dtype, cache)
                for kernel, compiled in compiler.kernels.items():
                    results.append(
                        {
                            "capability": capability,
                            "shape": shape.name,
                            "dtype": str(dtype).removeprefix("torch."),
                            "kv_cache": str(cache).removeprefix("torch."),
                            "kernel": kernel,
                            **resources(compiled, capability),
                        }
                    )
    columns = list(results[0])
    table = Table(*columns)
    for row in results:
        table.add_row(*map(str, row.values()))
    Console(width=140).print(table)
    if args.output:
        record.write_kernels(args.output, results)
    spilled = [
        row for row in results if row["spilled_bytes"] and row["capability"] in WITHOUT_SPILLS
    ]
    assert not spilled, f"registers spill: {spilled}"
    large = [row for row in results if row["shared_bytes"] > SHARED_MEMORY[row["capability"]]]
    assert not large, f"more shared memory than there is: {large}"


if __name__ == "__main__":
    main()
