"""How evenly a decode step is cut over a GPU, and the bytes it moves; worked out, not timed.

Usage: python -m scripts.bench.balance [--batches N] [--output FILE]

Random batches are given to the plan of `vllm_dca.cuda.plan_decode`. A place is a program that
runs at a time. A piece of work costs the keys that it reads, and START more to begin. Fails if
the busiest place has more than LIMITS allow, in terms of the mean place.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import numpy as np

from scripts.common import record
from vllm_dca.cuda import plan_decode
from vllm_dca.method.geometry import IntArray

MULTIPROCESSORS = {"A100": 108, "H100": 132, "B200": 148}
# Keys that could be read while a piece's queries and its first tile are waited for.
START = plan_decode.PACK_COST * plan_decode.UNIT
LIMITS = {"median": 1.1, "worst": 1.25}


class Step(NamedTuple):
    """A decode step of a layer.

    Attributes:
        keys: [num_requests] tokens of each request, the new ones included.
        rows: new tokens of each request.
        heads: query heads.
        kv_heads: heads of the KV cache.
        head_size: entries of a head.
        itemsize: bytes of an entry of the KV cache.
    """

    keys: IntArray
    rows: int
    heads: int = 32
    kv_heads: int = 8
    head_size: int = 128
    itemsize: int = 2

    @property
    def key_bytes(self) -> int:
        """Of one key and its value, for one KV head."""
        return 2 * self.head_size * self.itemsize

    @property
    def floor(self) -> int:
        """Bytes: every key and value once, queries and output once."""
        answers = 2 * len(self.keys) * self.rows * self.heads * self.head_size * 2
        return int(self.keys.sum()) * self.kv_heads * self.key_bytes + answers


class Cut(NamedTuple):
    """What a plan makes of a step.

    Attributes:
        busiest: the cost of the busiest place over that of the mean place.
        moved: bytes, partial results and the plan included.
    """

    busiest: float
    moved: int


class Pieces(NamedTuple):
    """What programs read, in order: which program, how many keys, and whether that is all."""

    program: IntArray
    keys: IntArray
    whole: IntArray


def pieces(step: Step, programs: int) -> Pieces:
    """As `vllm_dca.cuda.decode` takes the plan of `vllm_dca.cuda.plan_decode`."""
    pack_rows = min(plan_decode.rows_a_pack(step.heads // step.kv_heads), step.rows)
    last_row = np.minimum(np.arange(pack_rows, step.rows + pack_rows, pack_rows), step.rows)
    keys = (step.keys[:, None] - step.rows + last_row).flatten().repeat(step.kv_heads)
    sizes = -(-keys // plan_decode.UNIT) + plan_decode.PACK_COST
    ends = sizes.cumsum()
    units = int(ends[-1])
    share = -(-units // min(programs, max(units // plan_decode.MIN_SHARE, 1)))
    cuts = np.union1d(np.arange(0, units, share), np.append(0, ends))
    sequence = np.searchsorted(ends, cuts[:-1], side="right")
    begin = (ends - sizes)[sequence] + plan_decode.PACK_COST
    lo, hi = (
        np.clip((at - begin) * plan_decode.UNIT, 0, keys[sequence])
        for at in (cuts[:-1], cuts[1:])
    )
    read = hi > lo
    found = Pieces(cuts[:-1] // share, hi - lo, hi - lo == keys[sequence])
    return Pieces(*(column[read] for column in found))


def cut(step: Step, multiprocessors: int) -> Cut:
    """The plan of `vllm_dca.cuda.plan_decode`."""
    found = pieces(step, plan_decode.programs(multiprocessors))
    places = np.bincount(found.program, found.keys + START)
    group = step.heads // step.kv_heads
    pack_rows = min(plan_decode.rows_a_pack(group), step.rows)
    packs = len(step.keys) * -(-step.rows // pack_rows)
    split = int((~found.whole).sum())
    partials = 2 * split * pack_rows * group * (step.head_size + 1) * 4
    plan = 4 * (len(step.keys) * (step.rows + 2) + 6 * packs)
    again = (int(found.keys.sum()) - int(step.keys.sum()) * step.kv_heads) * step.key_bytes
    return Cut(float(places.max() / places.mean()), step.floor + again + partials + plan)


def random_step(generator: np.random.Generator) -> Step:
    """1 to 256 requests of 100 to 1M tokens, mixed, alike, or a giant among dwarfs."""

    def lengths(most: float, size: int) -> IntArray:
        return np.exp(generator.uniform(np.log(100), np.log(most), size)).astype(np.int64)

    requests = int(np.exp(generator.uniform(0, np.log(257))))
    kind = generator.integers(3)
    keys = lengths(1e6, requests) if kind == 0 else lengths(2e3, requests)
    if kind == 1:
        keys[generator.integers(requests)] = lengths(1e6, 1)[0]
    if kind == 2:
        keys[:] = lengths(1e6, 1)[0]
    heads, kv_heads = [(32, 8), (28, 4), (64, 8), (32, 32), (16, 1)][generator.integers(5)]
    return Step(keys, int(generator.integers(1, 9)), heads, kv_heads)


# What one would ask about, by name.
STEPS = {
    "1 request of 128k": Step(np.array([131_072]), 1),
    "70 requests of 8k": Step(np.full(70, 8_192), 1),
    "1 of 1M among 63 of 1k": Step(np.array([1_048_576] + [1_024] * 63), 1),
    "16 of 32k, 3 tokens speculated": Step(np.full(16, 32_768), 4),
    "1 of 128k, 16 new tokens": Step(np.array([131_072]), 16),
}


def distribution(cuts: list[Cut]) -> dict[str, float]:
    busiest = [cut.busiest for cut in cuts]
    return {"median": float(np.median(busiest)), "worst": max(busiest)}


def main() -> None:
    # The tests of the kernels use this module on machines that have no rich.
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, default=1000)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    generator = np.random.default_rng(0)
    steps = [random_step(generator) for _ in range(args.batches)]
    busiest = {
        card: distribution([cut(step, multiprocessors) for step in steps])
        for card, multiprocessors in MULTIPROCESSORS.items()
    }
    moved = {
        label: {"floor": step.floor, "moved": cut(step, MULTIPROCESSORS["H100"]).moved}
        for label, step in STEPS.items()
    }
    table = Table("", "median", "worst", title="busiest place / mean place")
    for card, found in busiest.items():
        table.add_row(card, *(f"{x:.2f}" for x in found.values()))
    Console().print(table)
    table = Table("a layer's step", "floor, MB", "MB", title="moved on 132 multiprocessors")
    for label, sizes in moved.items():
        table.add_row(label, *(f"{size / 1e6:,.1f}" for size in sizes.values()))
    Console().print(table)
    if args.output:
        facts = {**record.provenance("numpy"), "batches": args.batches}
        record.write(args.output, {**facts, "busiest": busiest, "moved": moved})
    for card, found in busiest.items():
        for which, limit in LIMITS.items():
            assert found[which] <= limit, f"{card}: {which} {found[which]:.3f}"


if __name__ == "__main__":
    main()
