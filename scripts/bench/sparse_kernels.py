"""Time sparse prefill's kernels on a GPU, one layer, beside a dense prefill and the floors.

Usage: python -m scripts.bench.sparse_kernels [--dry-run] [--output FILE]

8,192 new tokens at the end of contexts of 32k to 1M: what lines weigh (estimate), which are
taken (selection), attention along them, and all of it as a layer runs it; beside the same
tokens by the best dense provider. Lines are taken by budgets of the size that checkpoints have,
and by a share of attention; as queries and keys are random, so small a share takes about as
many keys. Before a case is timed, an answer along all lines is checked against the fp64
reference.

Operations and bytes are worked out, not measured. Operations stand beside those that a matrix
product (torch.mm) does in that time. Bytes are a step's fewest: each key once for all heads
that share it, each weight once; of attention, what programs read, most of it from the card's
cache.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from scripts.bench import cases, clock, providers
from scripts.bench.cases import Case
from scripts.bench.layer import Layer
from scripts.common import record
from vllm_dca.cuda import device, sparse_attend, sparse_probe
from vllm_dca.cuda.sparse_lists import list_lines
from vllm_dca.cuda.sparse_prefill import Sparse
from vllm_dca.cuda.sparse_select import choose
from vllm_dca.method.sparse_config import TILE
from vllm_dca.method.sparse_operations import SparsePlan
from vllm_dca.method.sparse_planning import sparse_segments
from vllm_dca.method.sparse_prefill import SparseSizes
from vllm_dca.method.vertical_slash import PROBE, Rule

# A vertical-slash pattern's usual ones, as MInference searches and Qwen's 1M checkpoints have.
VERTICALS, SLASHES = 1000, 6096
COVERAGE = 0.1
FP32 = 4
COLUMNS = "estimate selection attention all dense over_dense keys of_product"
LAYOUT = "{:<52}" + "{:>11}" * 8


class Taken(NamedTuple):
    """Keys that a step's tiles take, of all heads together.

    Attributes:
        read: keys, for each tile.
        pairs: of rows and keys.
        share: of the pairs that causal attention has.
    """

    read: int
    pairs: int
    share: float


class Bench:
    """A case's layer, prefilled sparsely by a rule."""

    def __init__(self, case: Case, rule: Rule, page: int) -> None:
        self.case, self.rule = case, rule.to(clock.DEVICE)
        self.layer = layer = providers.layer_of(case, page)
        geometry = layer.geometry
        self.segments = sparse_segments(
            layer.starts.numpy(), layer.seq_lens.numpy(), geometry.chunk_len, 0
        )
        assert sum(each.end - each.begin for each in self.segments) == case.new
        sizes = SparseSizes(
            case.shape.heads, case.new, case.context, geometry.chunk_len, rule.continuous
        )
        self.sparse = Sparse(sizes, clock.DEVICE)
        step = SparsePlan(self.segments, layer.block_table, geometry, None)
        self.plan = self.sparse.plan(step)
        [self.round] = self.plan.rounds
        self.buffers = self.sparse.buffers
        self.given: dict[str, Any] = {
            "rotation": layer.rotation,
            "softmax_scale": layer.scale,
        }
        self.placed = {"block_table": layer.block_table, "chunk_len": geometry.chunk_len}

    def all(self, rule: Rule | None = None) -> None:
        """As a layer runs it."""
        layer = self.layer
        self.sparse.attend(
            layer.query,
            layer.kv_cache,
            layer.output,
            plan=self.plan,
            rule=rule or self.rule,
            **self.given,
        )

    def estimate(self) -> None:
        sparse_probe.weigh(
            self.layer.query,
            self.layer.kv_cache,
            self.buffers.weights_of(self.round.probe),
            probe=self.round.probe,
            line_width=self.rule.line_width,
            **self.placed,
            **self.given,
        )

    def selection(self) -> None:
        """Of whatever is in the buffers: it goes over them as often, whatever they hold."""
        probe, buffers = self.round.probe, self.buffers
        choose(buffers.weights_of(probe), buffers.marks, probe, self.rule)
        list_lines(buffers.marks, buffers.lists, probe)

    def attention(self) -> None:
        layer, buffers = self.layer, self.buffers
        sparse_attend.attend(
            layer.query,
            layer.kv_cache,
            layer.output,
            buffers.marks,
            buffers.lists,
            plan=self.round,
            **self.placed,
            **self.given,
        )

    def check(self) -> None:
        """Along all lines it is dense attention."""
        self.layer.output.fill_(float("nan"))
        self.all(Rule(None, None, 1.0, self.case.context))
        self.layer.check()

    def taken(self) -> Taken:
        """By the marks that are there."""
        read = pairs = visible = 0
        for index, segment in enumerate(self.segments):
            verticals, distances = self.buffers.lines_of(self.round, index)
            for tile in range(segment.begin // TILE * TILE, segment.end, TILE):
                end, last = tile + TILE, min(tile + TILE, segment.end)
                rows = last - max(tile, segment.begin)
                near = distances[:, end - last + 1 : end + 1].flip(1)
                keys = int((verticals[:, :last] | near).sum())
                read += keys
                pairs += rows * keys
                visible += rows * last * len(verticals)
        return Taken(read, pairs, pairs / visible)

    def worked_out(self, taken: Taken) -> dict[str, dict[str, int]]:
        """Operations and bytes of each step."""
        shape, item = self.case.shape, cases.DTYPE.itemsize
        heads, size = shape.heads, shape.head_size
        ends = sum(each.end for each in self.segments)
        lines = sum((each.end - 1) // self.rule.line_width + 1 for each in self.segments)
        weights = heads * (ends + lines) * FP32
        queries = self.case.new * heads * size * item
        return {
            "operations": {
                # Each product twice: for the log-sum-exps, and for the weights.
                "estimate": 2 * 2 * PROBE * ends * heads * size,
                "selection": 0,
                "attention": 4 * taken.pairs * size,
            },
            "bytes": {
                "estimate": ends * shape.kv_heads * size * item + weights,
                "selection": weights + 2 * heads * ends,
                "attention": 2 * taken.read * size * item + 2 * queries,
            },
        }


def rules(small: bool, heads: int) -> dict[str, Rule]:
    """Few lines where there are few keys."""
    each = (40, 101) if small else (VERTICALS, SLASHES)
    budgets = [torch.full((heads,), n) for n in each]
    return {
        "budgets": Rule(*budgets, 1.0, 0),
        "coverage": Rule(None, None, COVERAGE, 0),
    }


def dense(layer: Layer, can: dict[str, Any]) -> Callable[[], None]:
    """The same tokens by the best provider that is here, checked."""
    by = device.prefill_by(next(iter(can.values())))
    plan = layer.plan_prefill(by)
    layer.output.fill_(float("nan"))
    layer.prefill(plan, by)
    layer.check()
    return lambda: layer.prefill(plan, by)


def row(case: Case, name: str, rule: Rule, can: dict[str, Any], page: int) -> dict[str, Any]:
    bench = Bench(case, rule, page)
    bench.check()
    launches = clock.launches(bench.all)
    taken = bench.taken()
    steps = {"all": bench.all, "attention": bench.attention, "estimate": bench.estimate}
    # Last: it leaves other marks.
    steps |= {"dense": dense(bench.layer, can), "selection": bench.selection}
    return {
        "case": str(case),
        **case._asdict(),
        "rule": name,
        "keys_share": taken.share,
        "launches": launches,
        "milliseconds": {step: clock.launched(run) for step, run in steps.items()},
        **bench.worked_out(taken),
    }


def with_floors(row: dict[str, Any], case: Case, facts: dict[str, Any]) -> dict[str, Any]:
    """A row with the milliseconds that its products take at least, and the share of them."""
    rate = facts["product_operations_per_second"] / 1e3
    times = {step: found["median"] for step, found in row["milliseconds"].items()}
    operations = {**row["operations"], "dense": case.operations}
    floors = {step: count / rate for step, count in operations.items()}
    floors["all"] = floors["estimate"] + floors["attention"]
    return {
        **row,
        "over_dense": times["all"] / times["dense"],
        "floor_product_ms": floors,
        "of_product": {step: floor / times[step] for step, floor in floors.items()},
    }


def printed(row: dict[str, Any]) -> str:
    times = [row["milliseconds"][name]["median"] for name in COLUMNS.split()[:5]]
    rest = row["over_dense"], row["keys_share"], row["of_product"]["attention"]
    case = f"{row['case']}, {row['rule']}"
    return LAYOUT.format(case, *(f"{value:.3f}" for value in (*times, *rest)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="small, and without a GPU")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    assert args.dry_run or not clock.REHEARSAL, "needs a GPU; --dry-run does not"
    page = providers.SMALL_PAGE if args.dry_run else providers.PAGE
    can, _ = providers.usable(page)
    facts = {**record.provenance("triton"), **clock.prepare(), "dense": next(iter(can))}
    print(LAYOUT.format("ms", *COLUMNS.split()))
    journal = record.Journal(args.output, facts)
    for case in cases.sparse(args.dry_run):
        for name, rule in rules(args.dry_run, case.shape.heads).items():
            with journal.attempt(f"{case}, {name}"):
                found = with_floors(row(case, name, rule, can, page), case, facts)
                journal.add(found)
                print(printed(found), flush=True)
    journal.end()


if __name__ == "__main__":
    main()
