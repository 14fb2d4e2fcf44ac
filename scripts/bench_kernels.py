"""Time DCA's decode and prefill on a GPU, one layer, beside plain attention and the floors.

Usage: bench_kernels.py [--quick] [--provider NAME] [--output FILE]

Needs torch and Triton; prefill is timed with vLLM's flash-attention or the flash-attn package
where one is there, else with the project's own Triton pass. Before a shape is timed, its answer
is checked against the fp64 reference, and a wrong one ends the run.

Floors: decode cannot be faster than its keys and values at the bandwidth of a copy, prefill not
faster than its products at the rate of a matrix product; both are measured first.
"""

import argparse
import functools
import itertools
import json
import platform
import subprocess
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from triton.testing import do_bench

from vllm_dca.geometry import ChunkGeometry
from vllm_dca.kernels.decode import decode_attention
from vllm_dca.kernels.merge import merge_parts
from vllm_dca.kernels.plan_decode import DecodePlanner, spare_slots
from vllm_dca.kernels.turn import turn_queries
from vllm_dca.kv_cache import split_kv
from vllm_dca.planning import plan_prefill
from vllm_dca.prefill import PrefillOperations, prefill_attention
from vllm_dca.providers import Needs
from vllm_dca.providers.choice import choose
from vllm_dca.reference import dual_chunk_attention, key_positions, rotate
from vllm_dca.rotary import QueryRotation

ROOT = Path(__file__).parents[1]
# Name, query heads, KV heads, head size, chunk_size, local_size.
SHAPES = [
    ("Llama-3-8B", 32, 8, 128, 6144, 1024),
    ("Qwen2.5-7B-1M", 28, 4, 128, 262144, 8192),
]
PAGE = 16
DTYPE = torch.bfloat16
DEVICE = "cuda"
K = 1024


class Layer:
    """A layer's paged cache and queries, random, the pages of each request scattered."""

    def __init__(self, shape: tuple[Any, ...], batch: int, context: int, new: int) -> None:
        self.name, heads, self.kv_heads, self.head_size, *sizes = shape
        self.geometry = ChunkGeometry(*sizes)
        self.context, self.new, self.group = context, new, heads // self.kv_heads
        torch.manual_seed(0)
        pages = -(-context // PAGE)
        size = (batch * pages, self.kv_heads, PAGE, 2 * self.head_size)
        self.kv_cache = torch.randn(size, dtype=DTYPE, device=DEVICE)
        table = torch.randperm(batch * pages, device=DEVICE).int()
        self.block_table = table.view(batch, pages)
        self.query = torch.randn(batch * new, heads, self.head_size, dtype=DTYPE, device=DEVICE)
        self.output = torch.empty_like(self.query)
        self.inv_freq = 1e6 ** -(torch.arange(0, self.head_size, 2) / self.head_size).double()
        angle = torch.arange(sizes[0] + 1)[:, None] * self.inv_freq
        table = torch.cat([angle.cos(), angle.sin()], -1).float().to(DEVICE)
        self.rotation = QueryRotation(table, True)
        self.starts = torch.arange(batch + 1, dtype=torch.int32) * new
        self.seq_lens = torch.full((batch,), context, dtype=torch.int32)
        self.scale = self.head_size**-0.5

    def plan_decode(self) -> Any:
        spare = spare_slots(multiprocessors(), self.kv_heads)
        planner = DecodePlanner(self.geometry, None, len(self.query), spare, self.query.device)
        starts, seq_lens = self.starts.to(DEVICE), self.seq_lens.to(DEVICE)
        return planner.plan(starts, seq_lens, self.block_table, len(self.query))

    def decode(self, plan: Any) -> None:
        decode_attention(
            self.query,
            self.kv_cache,
            self.output,
            plan=plan,
            rotation=self.rotation,
            softmax_scale=self.scale,
        )

    def plan_prefill(self, geometry: ChunkGeometry) -> Any:
        lengths = self.starts.numpy(), self.seq_lens.numpy()
        return plan_prefill(*lengths, self.block_table, PAGE, geometry)

    def prefill(self, plan: Any, operations: PrefillOperations) -> None:
        prefill_attention(
            self.query,
            *split_kv(self.kv_cache),
            self.output,
            plan=plan,
            rotation=self.rotation,
            softmax_scale=self.scale,
            operations=operations,
        )

    def check(self) -> None:
        """The last token of the first request, the first KV head, against fp64."""
        pages = self.kv_cache[self.block_table[0].long(), :1].transpose(1, 2)
        key, value = pages.flatten(0, 1)[: self.context].cpu().double().chunk(2, -1)
        c, w = self.geometry.chunk_size, self.geometry.local_size
        standing = key_positions(torch.arange(self.context), c, w)
        query = self.query[self.new - 1 : self.new, : self.group].cpu().double()
        query, key = (rotate(x, -p, self.inv_freq) for x, p in
                      ((query, standing[-1:]), (key, standing)))  # fmt: skip

        def reference(dtype: torch.dtype) -> torch.Tensor:
            return dual_chunk_attention(
                query.to(dtype),
                key.to(dtype),
                value.to(dtype),
                chunk_size=c,
                local_size=w,
                inv_freq=self.inv_freq,
                scale=self.scale,
                dtype=dtype,
            )[0].double()

        exact = reference(torch.float64)
        found = self.output[self.new - 1, : self.group].cpu().double()
        # As in the tests: twice the error of an ordinary computation in the same dtype.
        allowed = 2 * (reference(DTYPE) - exact).abs().max().item()
        allowed += 2 * torch.finfo(DTYPE).eps * exact.abs().max().item()
        error = (found - exact).abs().max().item()
        assert error <= allowed, f"{self.name}, {self.context} tokens: {error} > {allowed}"


def multiprocessors() -> int:
    return torch.cuda.get_device_properties(0).multi_processor_count


def milliseconds(run: Callable[..., None], *args: Any) -> dict[str, float]:
    low, median, high = do_bench(functools.partial(run, *args), quantiles=[0.2, 0.5, 0.8])
    return {"median": median, "low": low, "high": high}


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a device-to-device copy."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.numel() / (do_bench(lambda: target.copy_(source)) * 1e-3)


def product_rate() -> float:
    """Operations a second of a large matrix product."""
    a, b = (torch.randn(8192, 8192, dtype=DTYPE, device=DEVICE) for _ in range(2))
    return 2 * 8192**3 / (do_bench(lambda: a @ b) * 1e-3)


def bench_decode(provider: str, operations: PrefillOperations, bandwidth: float, quick: bool):
    contexts = [8 * K, 128 * K] if quick else [8 * K, 32 * K, 128 * K, 512 * K, 1024 * K]
    for shape in SHAPES:
        for batch in [1, 16] if quick else [1, 4, 16, 64]:
            for context in contexts:
                _, _, kv_heads, head_size, *_ = shape
                size = batch * context * kv_heads * 2 * head_size * DTYPE.itemsize
                if size > 0.4 * torch.cuda.get_device_properties(0).total_memory:
                    continue
                layer = Layer(shape, batch, context, new=1)
                plan = layer.plan_decode()
                layer.decode(plan)
                layer.check()
                dca = milliseconds(layer.decode, plan)
                # Chunks longer than the context: one causal pass, which is plain attention.
                whole = layer.plan_prefill(ChunkGeometry(2 * context + PAGE, PAGE))
                plain = milliseconds(layer.prefill, whole, operations)
                yield {
                    "step": "decode",
                    "shape": layer.name,
                    "batch": batch,
                    "context": context,
                    "of_copy_bandwidth": size / (dca["median"] * 1e-3) / bandwidth,
                    "over_plain": dca["median"] / plain["median"],
                    "plain_by": provider,
                    "dca_ms": dca,
                    "plain_ms": plain,
                    "floor_ms": size / bandwidth * 1e3,
                }


def bench_prefill(provider: str, operations: PrefillOperations, rate: float, quick: bool):
    for shape in SHAPES:
        for context in [32 * K] if quick else [32 * K, 64 * K, 128 * K, 256 * K]:
            layer = Layer(shape, 1, context, new=context)
            dca_plan = layer.plan_prefill(layer.geometry)
            plain_plan = layer.plan_prefill(ChunkGeometry(2 * context + PAGE, PAGE))
            layer.prefill(dca_plan, operations)
            layer.check()
            dca = milliseconds(layer.prefill, dca_plan, operations)
            plain = milliseconds(layer.prefill, plain_plan, operations)
            operations_count = 2 * context**2 * len(layer.query[0]) * layer.head_size
            yield {
                "step": "prefill",
                "shape": layer.name,
                "batch": 1,
                "context": context,
                "over_plain": dca["median"] / plain["median"],
                "plain_by": provider,
                "dca_ms": dca,
                "plain_ms": plain,
                "floor_ms": operations_count / rate * 1e3,
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few shapes")
    parser.add_argument("--provider", help="of the passes; else the first that works")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    assert torch.cuda.is_available(), "bench_kernels.py needs a GPU"

    capability = torch.cuda.get_device_capability()
    needs = Needs(128, DTYPE, DTYPE, PAGE, capability)
    provider, attend = choose("cuda", args.provider, needs)
    operations = PrefillOperations(turn_queries, attend, merge_parts)
    bandwidth, rate = copy_bandwidth(), product_rate()
    print(
        f"{torch.cuda.get_device_name()}: copies {bandwidth / 1e12:.2f} TB/s, multiplies "
        f"{rate / 1e12:.0f} TFLOP/s; passes by {provider}"
    )
    layout = "{:8}{:15}{:>6}{:>11}{:>13}{:>10}{:>10}{:>10}{:>14}"
    columns = "step shape batch context DCA/plain DCA_ms plain_ms floor_ms of_bandwidth"
    print(layout.format(*columns.split()))
    results = []
    for row in itertools.chain(
        bench_decode(provider, operations, bandwidth, args.quick),
        bench_prefill(provider, operations, rate, args.quick),
    ):
        results.append(row)
        share = row.get("of_copy_bandwidth")
        numbers = [row["dca_ms"]["median"], row["plain_ms"]["median"], row["floor_ms"]]
        print(
            layout.format(
                row["step"],
                row["shape"],
                row["batch"],
                f"{row['context']:,}",
                f"{row['over_plain']:.2f}",
                *(f"{number:.3f}" for number in numbers),
                "" if share is None else f"{share:.2f}",
            ),
            flush=True,
        )
    if args.output:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=ROOT, text=True, capture_output=True
        )
        record = {
            "command": "scripts/bench_kernels.py",
            "commit": commit.stdout.strip() or None,
            "device": torch.cuda.get_device_name(),
            "machine": platform.machine(),
            "versions": {"torch": torch.__version__, "triton": version("triton")},
            "copy_bytes_per_second": bandwidth,
            "product_operations_per_second": rate,
            "provider": provider,
            "dtype": str(DTYPE),
            "results": results,
        }
        args.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
