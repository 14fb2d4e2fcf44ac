"""Time DCA's decode and prefill on the CPU, one layer, beside vLLM's own CPU_ATTN.

Both get the same shapes; runs alternate, and what is printed first is the ratio of their
medians. Answers are checked against the fp64 reference before they are timed; for CPU_ATTN it
is given chunks longer than the context, where DCA is ordinary attention.

What the machine could do is measured beside them: a prefill is held against a matrix product
by torch, in the dtype that the processor multiplies, a decode against a plain read of as many
bytes, and against the larger of that and of the time that its products alone would take there.

A record is written after each row. The same command on the same commit goes on where it was
cut short.
"""

import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from scripts.bench.layer import Layer
from scripts.common import record
from vllm_dca.cpu import compiled, decode, paged_pass
from vllm_dca.cpu.merge import merge_parts
from vllm_dca.cpu.processor import processor
from vllm_dca.method.device import PrefillOperations
from vllm_dca.method.geometry import ChunkGeometry
from vllm_dca.method.prefill import by_passes
from vllm_dca.method.rotary import turn_queries

# Query heads, KV heads, head size.
SHAPES = {"SmolLM2-135M": (9, 3, 64), "Llama-3-8B": (32, 8, 128)}
LOCAL_SIZE = 1024
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PAGE = 128
BY_TORCH = by_passes(PrefillOperations(turn_queries, paged_pass.attention, merge_parts))
SECONDS = 10
PREFILL = 2048  # new tokens of a step's prefills, at the ends of their contexts
CACHED = 256  # new tokens of each request whose other ones are cached
STEPS = ("decode", "prefill", "cached")
MATRIX = 2048  # rows and columns of the matrices that are multiplied
# By which torch and its libraries take a processor for a lesser one.
LESSER = {
    "AVX2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "DNNL_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    }
}


class BothLayers(Layer):
    """A layer that CPU_ATTN can run too, on a copy of the cache in its own order."""

    def __init__(self, shape: tuple[Any, ...], batch: int, context: int, new: int, dtype: str):
        from vllm import _custom_ops as ops
        from vllm.platforms import current_platform
        from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

        current_platform.import_kernels()
        super().__init__(shape, batch, context, new, DTYPES[dtype], PAGE, "cpu")
        self.own_output = torch.empty_like(self.query)
        isa = _get_attn_isa(self.query.dtype, PAGE, self.head_size)
        packed = torch.empty_like(self.kv_cache)
        keys, values = packed.view(*packed.shape[:2], -1, self.head_size).chunk(2, dim=2)
        key, value = (
            half.transpose(1, 2).flatten(0, 1).contiguous()
            for half in self.kv_cache.chunk(2, dim=-1)
        )
        ops.cpu_attn_reshape_and_cache(key, value, keys, values, torch.arange(len(key)), isa)
        metadata = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=batch,
            num_heads=self.query.shape[1],
            num_kv_heads=self.kv_heads,
            head_dim=self.head_size,
            seq_lens=self.seq_lens,
            dtype=self.query.dtype,
            query_start_loc=self.starts,
            causal=True,
            sliding_window_size=-1,
            isa=isa,
            enable_kv_split=True,
        )

        def own() -> None:
            ops.cpu_attention_with_kv_cache(
                query=self.query,
                key_cache=keys,
                value_cache=values,
                output=self.own_output,
                query_start_loc=self.starts,
                seq_lens=self.seq_lens,
                scale=self.scale,
                causal=True,
                alibi_slopes=None,
                sliding_window=-1,
                block_table=self.block_table,
                softcap=0.0,
                scheduler_metadata=metadata,
                s_aux=None,
            )

        self.own = own

    def planned(self, plan_of: Callable[..., Any], attend: Callable[..., None]):
        plan = plan_of(self.starts, self.seq_lens, self.block_table, PAGE, self.geometry)

        def run() -> None:
            attend(
                self.query,
                self.kv_cache,
                self.output,
                plan=plan,
                rotation=self.rotation,
                softmax_scale=self.scale,
            )

        return run


def emulate(instructions: str) -> None:
    """As if the processor had no more: to torch, to the compiled kernel and to vLLM."""
    environment = LESSER[instructions]
    if not environment.items() <= os.environ.items():
        # They are read once, when torch is loaded.
        command = [sys.executable, "-m", "scripts.bench.cpu", *sys.argv[1:]]
        os.execve(sys.executable, command, {**os.environ, **environment})
    torch.cpu._is_avx512_supported = lambda: False  # vLLM asks it which library to load


def read(layer: Layer) -> Callable[[], object]:
    """What the machine does with nothing in the way: a read of as many bytes."""
    # Another copy, so that neither run finds in the processor's cache what the other read.
    copy = layer.kv_cache.clone().view(torch.float32).flatten()
    return copy.sum


def product(layer: Layer) -> Callable[[], object]:
    """Likewise a product of two square matrices."""
    dtype = layer.query.dtype
    if dtype != torch.float32 and processor().dtype != dtype:
        dtype = torch.float32
    left, right = torch.randn(2, MATRIX, MATRIX, dtype=dtype)
    return lambda: left @ right


def of_products(layer: Layer) -> float:
    """The layer's multiplications by keys and by values, over those of the matrices."""
    seen = sum(range(layer.context - layer.new + 1, layer.context + 1)) * len(layer.seq_lens)
    return 2 * seen * layer.query.shape[1] * layer.head_size / MATRIX**3


def alternate(
    runs: dict[str, Callable[[], object]], repeats: int
) -> dict[str, dict[str, float]]:
    """Milliseconds of each, run by turns: median, and the quartiles.

    There are fewer turns, but three, where they take longer than SECONDS.
    """
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    began = time.perf_counter()
    for turn in range(repeats):
        if turn >= 3 and time.perf_counter() - began > SECONDS:
            break
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append((time.perf_counter() - start) * 1e3)
    return {
        name: dict(
            zip(("low", "median", "high"), statistics.quantiles(found, n=4), strict=True),
            turns=len(found),
        )
        for name, found in times.items()
    }


def measure(
    step: str,
    shape: str,
    dtype: str,
    batch: int,
    context: int,
    chunk_len: int = 5120,
    repeats: int = 15,
) -> dict[str, Any]:
    """One row: a step of the layer by CPU_ATTN and by DCA."""
    new = {"decode": 1, "prefill": min(PREFILL // batch, context), "cached": CACHED}[step]
    kernel = compiled.CompiledPlan, compiled.attention
    sizes = shape, *SHAPES[shape], chunk_len + LOCAL_SIZE, LOCAL_SIZE
    layer = BothLayers(sizes, batch, context, new, dtype)
    layer.own()
    layer.check(layer.own_output, ChunkGeometry(2 * context + PAGE, PAGE))
    runs = {"DCA": layer.planned(*kernel)}
    # By torch a batch takes as much longer than one request as it is larger.
    if batch == 1 and step == "decode":
        runs["DCA by torch"] = layer.planned(decode.DecodePlan, decode.decode_attention)
    elif batch == 1:
        plan = layer.plan_prefill(BY_TORCH)
        runs["DCA by torch"] = lambda: layer.prefill(plan, BY_TORCH)
    for run in runs.values():
        layer.output.fill_(torch.nan)
        run()
        layer.check()
    limits = {"read": read(layer)} if step == "decode" else {}
    limits["torch.mm"] = product(layer)
    times = alternate({"CPU_ATTN": layer.own, **runs, **limits}, repeats)
    medians = {each: found["median"] for each, found in times.items()}
    arithmetic = of_products(layer) * medians["torch.mm"]
    limit = max(medians.get("read", 0.0), arithmetic)
    arguments = layer.starts, layer.seq_lens, layer.block_table, PAGE, layer.geometry
    planning = alternate({"plan": lambda: kernel[0](*arguments)}, 20)["plan"]["median"]
    return {
        "step": step,
        "shape": shape,
        "dtype": dtype,
        "batch": batch,
        "context": context,
        "chunk_len": chunk_len,
        "new": new,
        "ratio": medians["DCA"] / medians["CPU_ATTN"],
        "yardstick": next(iter(limits)),
        "share": medians.get("read", arithmetic) / medians["DCA"],
        "arithmetic_milliseconds": arithmetic,
        "share_of_limit": limit / medians["DCA"],
        "milliseconds": times,
        "plan_milliseconds_a_step": planning,
    }


def main(
    repeats: Annotated[int, typer.Option(min=3)] = 15,
    context: Annotated[str, typer.Option(help="Spaces between.")] = "16384",
    chunk_len: Annotated[str, typer.Option(help="Spaces between.")] = "5120",
    shape: Annotated[str, typer.Option(help="Spaces between.")] = " ".join(SHAPES),
    dtype: Annotated[str, typer.Option(help="Spaces between.")] = " ".join(DTYPES),
    batch: Annotated[str, typer.Option(help="Spaces between.")] = "1 8",
    step: Annotated[
        str, typer.Option(help=f"Among {', '.join(STEPS)}, spaces between.")
    ] = "decode prefill",
    instructions: Annotated[
        str | None, typer.Option(help=f"No more than these: {', '.join(LESSER)}.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="A record as JSON.")] = None,
) -> None:
    if instructions is not None:
        if instructions not in LESSER:
            raise typer.BadParameter(f"{instructions!r} is not among {', '.join(LESSER)}")
        emulate(instructions)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    facts = record.provenance("vllm", "vllm-dca")
    facts["instructions"] = compiled.instructions()
    facts["emulated"] = instructions is not None
    console = Console()
    names = ("DCA", "CPU_ATTN", "DCA by torch")
    of_times = (f"{name}, ms" for name in names)
    columns = ("step", "shape", "dtype", "batch", "context", "chunk_len")
    shares = ("of torch.mm or a read", "of the larger")
    table = Table(*columns, "DCA / CPU_ATTN", *shares, *of_times)
    rows = record.resumed(output, facts)
    known = {tuple(row[key] for key in columns): row for row in rows}
    each: tuple[Any, ...]
    numbers = (map(int, words.split()) for words in (batch, context, chunk_len))
    for each in itertools.product(step.split(), shape.split(), dtype.split(), *numbers):
        row = known.get(each)
        if row is None:
            row = measure(*each, repeats)
            rows.append(row)
        if output:
            record.write(output, {**facts, "results": rows})
        times = row["milliseconds"]
        medians = [f"{times[name]['median']:.2f}" if name in times else "" for name in names]
        found = (f"{row[key]:.2f}" for key in ("ratio", "share", "share_of_limit"))
        cells = [*map(str, each), *found]
        table.add_row(*cells, *medians)
        console.print(*cells)
    console.print(table)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, rich_markup_mode="markdown")
    app.command(help=__doc__)(main)
    app()
