"""Time DCA's decode and prefill on a GPU, one layer, beside plain attention and the floors.

Usage: python -m scripts.bench.kernels [--quick] [--provider NAME] [--output FILE]

Needs torch and Triton; prefill is timed with vLLM's flash-attention or the flash-attn package
where one is there, else with the project's own Triton pass. Before a shape is timed, its answer
is checked against the fp64 reference, and a wrong one ends the run.

Floors: decode cannot be faster than its keys and values at the bandwidth of a copy, prefill not
faster than its products at the rate of a matrix product; both are measured first.
"""

import argparse
import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from triton.testing import do_bench

from scripts.bench.layer import Layer
from scripts.common import record
from vllm_dca.cuda.decode import decode_attention
from vllm_dca.cuda.merge import merge_parts
from vllm_dca.cuda.plan_decode import DecodePlanner, spare_slots
from vllm_dca.cuda.turn import turn_queries
from vllm_dca.engine.choice import choose
from vllm_dca.method.device import PrefillOperations
from vllm_dca.method.geometry import ChunkGeometry
from vllm_dca.method.provider import Needs

# Name, query heads, KV heads, head size, chunk_size, local_size.
SHAPES = [
    ("Llama-3-8B", 32, 8, 128, 6144, 1024),
    ("Qwen2.5-7B-1M", 28, 4, 128, 262144, 8192),
]
PAGE = 16
DTYPE = torch.bfloat16
DEVICE = "cuda"
K = 1024


class DecodingLayer(Layer):
    def __init__(self, shape: tuple[Any, ...], batch: int, context: int) -> None:
        super().__init__(shape, batch, context, new=1, dtype=DTYPE, page=PAGE, device=DEVICE)

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
                layer = DecodingLayer(shape, batch, context)
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
            layer = Layer(shape, 1, context, context, DTYPE, PAGE, DEVICE)
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
    assert torch.cuda.is_available(), "needs a GPU"

    capability = torch.cuda.get_device_capability()
    needs = Needs(128, DTYPE, DTYPE, PAGE, capability)
    provider, attend, _ = choose("cuda", args.provider, needs)
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
        found = {
            "device": torch.cuda.get_device_name(),
            "copy_bytes_per_second": bandwidth,
            "product_operations_per_second": rate,
            "provider": provider,
            "dtype": str(DTYPE),
            "results": results,
        }
        record.write(args.output, {**record.provenance("triton"), **found})


if __name__ == "__main__":
    main()
