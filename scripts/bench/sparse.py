"""Time sparse prefill on the CPU, one layer, beside dense attention of the same tokens.

Lines are given, so that a known share of the keys is kept: half of them in blocks of 64
distances, half in single keys. Beside it, what weighing and selecting costs. Runs alternate;
their medians are compared.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from scripts.bench.cpu import DTYPES, PAGE, SHAPES
from scripts.bench.layer import Layer
from scripts.common import record
from vllm_dca.cpu import compiled, compiled_sparse
from vllm_dca.method.sparse_config import COVERAGE, MIN_KEYS, TILE
from vllm_dca.method.sparse_operations import SparsePlan
from vllm_dca.method.sparse_planning import Segment, sparse_segments
from vllm_dca.method.vertical_slash import Lines, Rule

RULES = {"auto": Rule(None, None, COVERAGE, MIN_KEYS)}
# Chunks of 6,144 tokens.
SIZES = (7168, 1024)


def lines_of(heads: int, end: int, share: float) -> Lines:
    """Random lines that keep a share of the keys before `end`."""
    blocks = torch.rand(heads, end // TILE + 2) < share / 2
    blocks[:, :2] = True
    distances = torch.zeros(heads, end + TILE + 1, dtype=torch.bool)
    distances[:, 1:] = blocks.repeat_interleave(TILE, 1)[:, : end + TILE]
    return Lines(torch.rand(heads, end) < share / 2, distances)


def kept(lines: Lines, segment: Segment) -> float:
    """The share of the keys up to its own that a row has, on average."""
    seen = rows = 0
    for start in range(segment.begin // TILE * TILE, segment.end, TILE):
        distances = lines.distances[:, 1 : start + TILE + 1].flip(1)[:, :start]
        seen += (distances | lines.verticals[:, :start]).sum(1).float().mean().item() + TILE / 2
        rows += start + TILE / 2
    return seen / rows


def timed(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Milliseconds, the median of each."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(of) for name, of in times.items()}


def measure(
    model: str, dtype: str, context: int, new: int, shares: list[float], repeats: int
) -> dict[str, Any]:
    layer = Layer((model, *SHAPES[model], *SIZES), 1, context, new, DTYPES[dtype], PAGE, "cpu")
    geometry, heads = layer.geometry, layer.query.shape[1]
    segments = sparse_segments([0, new], [context], geometry.chunk_len, 0)
    plan = SparsePlan(segments, layer.block_table, geometry, None)
    given: dict[str, Any] = {
        "plan": plan,
        "rotation": layer.rotation,
        "softmax_scale": layer.scale,
    }
    dense = compiled.CompiledPlan(
        layer.starts, layer.seq_lens, layer.block_table, PAGE, geometry
    )

    def attend(lines: list[Lines]) -> None:
        for segment, own in zip(segments, lines, strict=True):
            rows, output = layer.query[segment.rows], layer.output[segment.rows]
            compiled_sparse.attend(
                rows, layer.kv_cache, output, segment=segment, lines=own, **given
            )

    def weigh(rule: Rule) -> None:
        for segment in segments:
            rows = layer.query[segment.rows]
            weights = compiled_sparse.weigh(
                rows, layer.kv_cache, segment=segment, rule=rule, **given
            )
            compiled_sparse.select(*weights, rule)

    every = {
        share: [lines_of(heads, segment.end, share) for segment in segments] for share in shares
    }
    budgets = torch.full((heads,), 4000)
    rules = {**RULES, "checkpoint": Rule(budgets, budgets, 1.0, 0)}
    found = timed(
        {
            "dense": lambda: compiled.attention(
                layer.query,
                layer.kv_cache,
                layer.output,
                plan=dense,
                rotation=layer.rotation,
                softmax_scale=layer.scale,
            ),
            **{f"{share}": lambda own=own: attend(own) for share, own in every.items()},
            **{f"{name}": lambda rule=rule: weigh(rule) for name, rule in rules.items()},
        },
        repeats,
    )
    return {
        "model": model,
        "dtype": dtype,
        "context": context,
        "new": new,
        "dense_ms": found["dense"],
        "select": {name: found[name] / found["dense"] for name in rules},
        "attend": {
            kept(own[-1], segments[-1]): found[f"{share}"] / found["dense"]
            for share, own in every.items()
        },
    }


def main(
    model: Annotated[list[str], typer.Option(help="Shapes.")] = list(SHAPES),  # noqa: B006
    dtype: Annotated[list[str], typer.Option(help="Of the cache.")] = list(DTYPES),  # noqa: B006
    context: Annotated[list[int], typer.Option(help="Tokens.")] = [32768, 131072],  # noqa: B006
    new: Annotated[int, typer.Option(help="Of these new.")] = 2048,
    share: Annotated[list[float], typer.Option(help="Of keys.")] = [0.02, 0.1, 0.3],  # noqa: B006
    repeats: Annotated[int, typer.Option(help="Of each.")] = 3,
    output: Annotated[Path | None, typer.Option(help="Write a record here.")] = None,
) -> None:
    """Time as a share of dense attention's."""
    table = Table(
        "shape", "dtype", "context", "dense, ms", "select", "attend, by share of keys"
    )
    results = []
    for name in model:
        for kind in dtype:
            for length in context:
                found = measure(name, kind, length, new, share, repeats)
                results.append(found)
                table.add_row(
                    name,
                    kind,
                    f"{length}",
                    f"{found['dense_ms']:.0f}",
                    ", ".join(f"{key} {value:.3f}" for key, value in found["select"].items()),
                    ", ".join(f"{k:.3f}: {v:.3f}" for k, v in found["attend"].items()),
                )
    Console(width=160).print(table)
    if output is not None:
        record.write(output, {**record.provenance(), "results": results})


if __name__ == "__main__":
    typer.run(main)
