"""The heaviest lines of sparse segments, found on the device; nothing waits.

One program has a head of a segment, and its verticals or its distances. It finds the least
weight that is taken by halving twice, sixteen times over: sums in fp64 are few, sorting would
want several copies of all weights. Of lines of equal weight the first are taken.
"""

import torch
import triton
import triton.language as tl

from vllm_dca.cuda.sparse_lists import BLOCK, Marks
from vllm_dca.cuda.sparse_plan import COLUMNS, Probe
from vllm_dca.cuda.sparse_probe import Weights
from vllm_dca.method.sparse_config import TILE
from vllm_dca.method.vertical_slash import FIRST_KEYS, NEAR_DIAGONALS, Rule


@triton.jit
def _bits(weights, more, base, n, BLOCK: tl.constexpr, TWO: tl.constexpr):
    """Weights from `base` on and their bits, which are in their order; -1 past the end."""
    at = base + tl.arange(0, BLOCK)
    weight = tl.load(weights + at, mask=at < n, other=0.0)
    if TWO:
        weight += tl.load(more + at, mask=at < n, other=0.0)
    return weight, tl.where(at < n, weight.to(tl.int32, bitcast=True), -1), at


@triton.jit
def _mark(
    weights,  # [n] fp32
    more,  # likewise, to be added, if TWO
    marked,  # [n], written: 1 of the elements' type or 0; may be `weights`
    n,
    always,  # the first so many are taken
    budget,
    LEAST: tl.constexpr,
    COVERAGE: tl.constexpr,
    BY_BUDGET: tl.constexpr,
    TWO: tl.constexpr,
    BLOCK: tl.constexpr,
):
    always = tl.minimum(always, n)
    needed = tl.full([], 0.0, tl.float64)
    covered = tl.full([], 0.0, tl.float64)
    count = budget - always
    if not BY_BUDGET:
        count = LEAST - always
        all_of = tl.zeros([BLOCK], tl.float64)
        first = tl.zeros([BLOCK], tl.float64)
        for base in range(0, n, BLOCK):
            weight, bits, at = _bits(weights, more, base, n, BLOCK, TWO)
            all_of += weight.to(tl.float64)
            first += tl.where(at < always, weight, 0.0).to(tl.float64)
        needed = tl.sum(all_of, 0) * COVERAGE
        covered = tl.sum(first, 0)
    count = tl.maximum(tl.minimum(count, n - always), 0)

    # The largest number whose equals and betters are enough; two of its bits at a time.
    least = tl.full([], 0, tl.int64)
    for step in range(16):
        shift = 30 - 2 * step
        counts1, counts2, counts3 = (
            tl.zeros([BLOCK], tl.int32),
            tl.zeros([BLOCK], tl.int32),
            tl.zeros([BLOCK], tl.int32),
        )
        sums1, sums2, sums3 = (
            tl.zeros([BLOCK], tl.float64),
            tl.zeros([BLOCK], tl.float64),
            tl.zeros([BLOCK], tl.float64),
        )
        unit = tl.full([], 1, tl.int64) << shift
        for base in range(0, n, BLOCK):
            weight, bits, at = _bits(weights, more, base, n, BLOCK, TWO)
            bits = tl.where(at < always, -1, bits).to(tl.int64)
            above1, above2, above3 = (
                bits >= least + unit,
                bits >= least + 2 * unit,
                bits >= least + 3 * unit,
            )
            counts1 += above1.to(tl.int32)
            counts2 += above2.to(tl.int32)
            counts3 += above3.to(tl.int32)
            if not BY_BUDGET:
                wide = weight.to(tl.float64)
                sums1 += tl.where(above1, wide, 0.0)
                sums2 += tl.where(above2, wide, 0.0)
                sums3 += tl.where(above3, wide, 0.0)
        least += unit * (
            _enough(counts1, sums1, count, covered, needed)
            + _enough(counts2, sums2, count, covered, needed)
            + _enough(counts3, sums3, count, covered, needed)
        )

    # Of those that are equal to it, as many as are still wanted.
    better = tl.zeros([BLOCK], tl.int32)
    sums = tl.zeros([BLOCK], tl.float64)
    for base in range(0, n, BLOCK):
        weight, bits, at = _bits(weights, more, base, n, BLOCK, TWO)
        above = (at >= always) & (bits.to(tl.int64) > least)
        better += above.to(tl.int32)
        sums += tl.where(above, weight, 0.0).to(tl.float64)
    wanted = count - tl.sum(better, 0)
    if not BY_BUDGET:
        covered += tl.sum(sums, 0)
        # No weight has more bits than 31: where nothing is wanted, this is no number's.
        value = tl.where(least < 0x7F800000, least, 0).to(tl.int32).to(tl.float32, bitcast=True)
        value = value.to(tl.float64)
        lacking = tl.where(value > 0, (needed - covered) / tl.where(value > 0, value, 1.0), 0.0)
        some = tl.maximum(lacking, 0.0).to(tl.int64)
        some = tl.maximum(some - 1, 0)
        # What was divided was rounded; what is added up is not.
        for _step in range(3):
            some += (covered + some.to(tl.float64) * value < needed) & (value > 0)
        # Weights of nothing, where rounding lets all not be enough.
        some = tl.where((value == 0) & (covered < needed), n, some)
        wanted = tl.maximum(wanted, some)
    before = tl.full([], 0, tl.int64)
    for base in range(0, n, BLOCK):
        weight, bits, at = _bits(weights, more, base, n, BLOCK, TWO)
        bits = bits.to(tl.int64)
        equal = (at >= always) & (bits == least)
        rank = before + tl.cumsum(equal.to(tl.int32), 0)
        taken = (at < always) | (bits > least) | (equal & (rank <= wanted))
        before += tl.sum(equal.to(tl.int32), 0)
        tl.debug_barrier()
        tl.store(marked + at, taken.to(marked.dtype.element_ty), mask=at < n)


@triton.jit
def _enough(counts, sums, count, covered, needed):
    return ((tl.sum(counts, 0) >= count) & (covered + tl.sum(sums, 0) >= needed)).to(tl.int64)


@triton.jit(do_not_specialize=["places"])
def _choose_kernel(
    segments,  # [num_segments, COLUMNS]
    vertical,  # [num_heads, places] fp32
    slash,  # [2, num_heads, places] fp32; the first half is overwritten
    verticals,  # [num_heads, places] uint8, written
    distances,  # likewise
    vertical_budgets,  # [num_heads] int64, if BY_BUDGET
    slash_budgets,
    places,
    num_heads,
    FIRST_KEYS: tl.constexpr,
    NEAR_DIAGONALS: tl.constexpr,
    LEAST: tl.constexpr,
    COVERAGE: tl.constexpr,
    BY_BUDGET: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    head, segment = tl.program_id(0), tl.program_id(1)
    end = tl.load(segments + segment * COLUMNS)
    first = tl.cast(head, tl.int64) * places + tl.load(segments + segment * COLUMNS + 2)
    budget = 0
    if tl.program_id(2) == 0:
        if BY_BUDGET:
            budget = tl.load(vertical_budgets + head).to(tl.int32)
        _mark(
            vertical + first, vertical, verticals + first, end, FIRST_KEYS, budget, LEAST,
            COVERAGE, BY_BUDGET, False, BLOCK,
        )  # fmt: skip
    else:
        if BY_BUDGET:
            budget = tl.load(slash_budgets + head).to(tl.int32)
        slash += first
        near: tl.constexpr = (NEAR_DIAGONALS + WIDTH - 2) // WIDTH + 1
        lines = (end - 1) // WIDTH + 1
        _mark(
            slash, slash + tl.cast(num_heads, tl.int64) * places, slash, lines, near, budget,
            (LEAST + WIDTH - 1) // WIDTH, COVERAGE, BY_BUDGET, True, BLOCK,
        )  # fmt: skip
        # A line is at the distances of the tile's keys that its rows have on it.
        tl.debug_barrier()
        distances += first
        tl.store(distances, 0)
        tile, t = tl.arange(0, BLOCK // TILE)[:, None], tl.arange(0, TILE)[None, :]
        for base in range(0, end + TILE, BLOCK):
            at = base + tile * TILE + t
            if WIDTH == 1:
                # From a block's first to here, and in the block before what comes after.
                here = tl.load(slash + at, mask=at < lines, other=0.0)
                there = tl.load(
                    slash + at - TILE, mask=(at >= TILE) & (at - TILE < lines), other=0.0
                )
                within = tl.cumsum(here, 1) > 0
                within |= tl.sum(there, 1)[:, None] > tl.cumsum(there, 1)
            else:
                line = at // TILE
                within = tl.load(slash + line, mask=line < lines, other=0.0) > 0
            tl.store(distances + 1 + at, within.to(tl.uint8), mask=at < end + TILE)


def choose(weights: Weights, marks: Marks, probe: Probe, rule: Rule) -> None:
    """Mark the heaviest lines of each segment, as `vllm_dca.method.vertical_slash.select` does.

    Args:
        weights: as `vllm_dca.cuda.sparse_probe.weigh` leaves them; used up.
        marks: written.
        probe: whose segments these are.
        rule: of the layer; its budgets are on the device.
    """
    num_heads = len(weights.vertical)
    _choose_kernel[(num_heads, len(probe.ends), 2)](
        probe.segments,
        *weights,
        *(each.view(torch.uint8) for each in marks),
        rule.verticals,
        rule.slashes,
        weights.vertical.stride(0),
        num_heads,
        FIRST_KEYS=FIRST_KEYS,
        NEAR_DIAGONALS=NEAR_DIAGONALS,
        LEAST=rule.min_keys,
        COVERAGE=rule.coverage,
        BY_BUDGET=rule.verticals is not None,
        WIDTH=rule.line_width,
        TILE=TILE,
        COLUMNS=COLUMNS,
        BLOCK=BLOCK,
        num_warps=8,
    )
