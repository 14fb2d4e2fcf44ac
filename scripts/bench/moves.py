"""Bytes that a layer's step moves, beside the fewest; worked out, not measured.

Floor: every key and value once, queries and output once. What programs read again is counted
for decode, where a program is alone with its keys; in a prefill all tiles of queries read the
same keys, which is the cache's work.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from scripts.bench import balance, cases
from scripts.bench.cases import Case

ITEM = cases.DTYPE.itemsize
LSE = 4


class Launches(NamedTuple):
    """Of a layer's prefill, and what they hand to one another.

    Attributes:
        launches: how many.
        copies: how often all queries, or as many answers, are read or written beyond the floor.
        lse: how often a log-sum-exp of each query is.
    """

    launches: int
    copies: int
    lse: int

    def moved(self, tokens: int, heads: int, head_size: int) -> int:
        """Bytes beyond the floor, where all tokens have all regions."""
        return tokens * heads * (self.copies * head_size * ITEM + self.lse * LSE)


def by_passes(regions: int) -> Launches:
    """Each pass writes its answers, and all but the first read turned copies of queries."""
    if regions == 1:
        return Launches(1, 0, 1)
    turned = 3 * (regions - 1)  # read, written, read
    answers = 2 * regions + 1  # written, read and merged; one of them is the floor's
    return Launches(regions + 2, turned + answers - 1, 2 * regions)


def by_one_launch(regions: int) -> Launches:
    """For each region a program reads its queries, and writes turned ones and reads those."""
    return Launches(1, 3 * regions - 1, 0)


def prefill(by: Callable[[int], Launches], case: Case) -> dict[str, int]:
    """As if all tokens had as many regions as the last has."""
    tokens, shape = case.batch * case.new, case.shape
    chunk = (case.context - 1) // (shape.chunk_size - shape.local_size)
    floor = case.cache_bytes + 2 * tokens * shape.heads * shape.head_size * ITEM
    more = by(min(chunk, 2) + 1).moved(tokens, shape.heads, shape.head_size)
    return {"floor_bytes": floor, "moved_bytes": floor + more}


def decode(case: Case, multiprocessors: int) -> dict[str, int]:
    """As `scripts.bench.balance` has it: read again, partial results, and the plan."""
    shape = case.shape
    keys = np.full(case.batch, case.context)
    step = balance.Step(keys, case.new, shape.heads, shape.kv_heads, shape.head_size, ITEM)
    moved = balance.cut(step, multiprocessors).moved
    return {"floor_bytes": step.floor, "moved_bytes": moved}
