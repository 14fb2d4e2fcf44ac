"""Which lines of sparse segments are taken: as marks, and as lists that kernels walk."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from vllm_dca.cuda.sparse_plan import COLUMNS, Probe
from vllm_dca.method.sparse_config import TILE

BLOCK = 2048  # lines, looked at side by side


class Marks(NamedTuple):
    """Which lines are taken in each segment, at its places.

    As `vllm_dca.method.vertical_slash.Lines` has them.

    Attributes:
        verticals: [num_heads, places] bool.
        distances: likewise.
    """

    verticals: torch.Tensor
    distances: torch.Tensor


class Lists(NamedTuple):
    """The same as ascending numbers.

    Attributes:
        verticals: [num_heads, places] int32, keys of each segment from its first place on.
        distances: likewise.
        counts: [2, num_segments, num_heads] int32, how many of either kind.
    """

    verticals: torch.Tensor
    distances: torch.Tensor
    counts: torch.Tensor


@triton.jit(do_not_specialize=["places"])
def _list_kernel(
    segments,
    verticals,  # [num_heads, places] uint8
    distances,
    vertical_list,  # [num_heads, places] int32, written
    distance_list,
    counts,  # [2, num_segments, num_heads] int32, written
    places,
    num_heads,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    head, segment, kind = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    end = tl.load(segments + segment * COLUMNS)
    first = tl.cast(head, tl.int64) * places + tl.load(segments + segment * COLUMNS + 2)
    count = 0
    n = tl.where(kind == 0, end, end + TILE + 1)
    marks = verticals
    numbers = vertical_list
    if kind == 1:
        marks = distances
        numbers = distance_list
    for base in range(0, n, BLOCK):
        at = base + tl.arange(0, BLOCK)
        taken = tl.load(marks + first + at, mask=at < n, other=0) != 0
        place = count + tl.cumsum(taken.to(tl.int32), 0) - 1
        tl.store(numbers + first + place, at, mask=taken)
        count += tl.sum(taken.to(tl.int32), 0)
    tl.store(counts + (kind * tl.num_programs(1) + segment) * num_heads + head, count)


def list_lines(marks: Marks, lists: Lists, probe: Probe) -> None:
    """Write down what is marked, in order.

    Args:
        marks: of each segment.
        lists: written, up to their counts.
        probe: whose segments these are.
    """
    num_heads = len(marks.verticals)
    _list_kernel[(num_heads, len(probe.ends), 2)](
        probe.segments,
        *(each.view(torch.uint8) for each in marks),
        *lists,
        marks.verticals.stride(0),
        num_heads,
        TILE=TILE,
        COLUMNS=COLUMNS,
        BLOCK=BLOCK,
        num_warps=8,
    )
