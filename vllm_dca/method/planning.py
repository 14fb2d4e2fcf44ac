"""From a batch's lengths to what the three attention passes need; once a step, for all layers.

The host knows the lengths exactly, so nothing here waits for a device: integers are worked
out in numpy and copied over without blocking. The block table, which only the device holds,
is gathered there.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from vllm_dca.method.geometry import ChunkGeometry, IntArray, Segments, split_at_chunk_borders
from vllm_dca.method.provider import PagedSegments

# On the host, by name.
Arrays = dict[str, npt.NDArray[np.generic]]


class QueryTurns(NamedTuple):
    """Which rotated copies of the queries are made; on the device.

    Attributes:
        tokens: [num_turned] int32, index of the token to take the query from.
        turn: [num_turned] int32, positions to turn it further, 0 .. c.
        temperature: [num_turned] fp32, factor to scale it by; None where there is none.
    """

    tokens: torch.Tensor
    turn: torch.Tensor
    temperature: torch.Tensor | None = None


class Turns(NamedTuple):
    """How far the queries of some rows turn, for intra, succ and inter.

    Attributes:
        turn: [3, num_rows] int64, positions.
        temperature: [num_rows] fp32, factor to scale each by; None where there is none.
    """

    turn: torch.Tensor
    temperature: torch.Tensor | None


class Part(NamedTuple):
    """Which of a batch's tokens a pass answers; see `vllm_dca.method.device.Partial`."""

    tokens: torch.Tensor
    rows: torch.Tensor


@dataclass
class PrefillPlan:
    """Passes over a batch's prefill tokens.

    Attributes:
        passes: intra over all tokens, then succ and inter where any token needs them.
        parts: the tokens of each pass but the first.
        turns: copies for each pass but the first, and with a temperature for the first too,
            pass after pass; None where nothing is copied.
        turn_sizes: how many copies belong to each pass that needs some.
    """

    passes: list[PagedSegments]
    parts: list[Part]
    turns: QueryTurns | None
    turn_sizes: list[int]


def plan_prefill(
    query_start_loc: npt.ArrayLike,
    seq_lens: npt.ArrayLike,
    block_table: torch.Tensor,
    block_size: int,
    geometry: ChunkGeometry,
    original_max_position_embeddings: int | None = None,
) -> PrefillPlan:
    """Plan the passes over requests; see `vllm_dca.method.device.PlanPrefill`."""
    length = original_max_position_embeddings
    regions = _regions(query_start_loc, seq_lens, geometry)
    # A temperature scales the queries of the first pass, too.
    copied = regions[1:] if length is None else regions
    num_tokens = int(regions[0].segments.length.sum())
    *passes, turned = upload(
        [
            *(_pass_arrays(each, num_tokens, block_size) for each in regions),
            _turn_arrays(copied, length),
        ],
        block_table.device,
    )
    turns, parts = None, []
    sizes = [int(region.segments.length.sum()) for region in copied]
    if copied:
        turns = QueryTurns(**turned)
        # The first pass, intra, answers every token in order, and is no part.
        answered = turns.tokens.split(sizes)[len(copied) - len(regions) + 1 :]
        parts = [
            Part(tokens, there["rows"])
            for tokens, there in zip(answered, passes[1:], strict=True)
        ]
    return PrefillPlan(
        passes=[
            PagedSegments(
                query_lens=region.segments.length,
                key_lens=region.num_keys,
                cu_seqlens_q=there["cu_seqlens_q"],
                cu_seqlens_k=there["cu_seqlens_k"],
                seqused_k=there["seqused_k"],
                block_table=_slice_rows(
                    block_table,
                    there["request"],
                    there["first_page"],
                    -(-int(region.num_keys.max()) // block_size),
                ),
                causal=region.causal,
            )
            for region, there in zip(regions, passes, strict=True)
        ],
        parts=parts,
        turns=turns,
        turn_sizes=sizes,
    )


class _Region(NamedTuple):
    """One pass: segments, which keys each reads, and how far a query at an offset turns."""

    segments: Segments
    first_key: IntArray
    num_keys: IntArray
    turn: Callable[[IntArray], IntArray]
    causal: bool = False


def _pass_arrays(region: _Region, num_tokens: int, block_size: int) -> Arrays:
    """What a pass needs on the device."""
    segments = region.segments
    return {
        "cu_seqlens_q": np.append(0, segments.length.cumsum()),
        "cu_seqlens_k": np.append(0, region.num_keys.cumsum()),
        "seqused_k": region.num_keys,
        "request": segments.request,
        "first_page": region.first_key // block_size,
        "rows": _inverse(segments.token_indices(), num_tokens),
    }


def _turn_arrays(copied: list[_Region], length: int | None) -> Arrays:
    """The same of the copies, by the names that `QueryTurns` has."""
    if not copied:
        return {}
    segments = [region.segments for region in copied]
    arrays: Arrays = {
        "tokens": np.concatenate([each.token_indices() for each in segments]),
        "turn": np.concatenate([each.turn(each.segments.token_offsets()) for each in copied]),
    }
    if length is not None:
        positions = np.concatenate([each.token_positions() for each in segments])
        arrays["temperature"] = query_temperature(positions, length)
    return arrays


def _regions(
    query_start_loc: npt.ArrayLike, seq_lens: npt.ArrayLike, geometry: ChunkGeometry
) -> list[_Region]:
    """Intra, then succ and inter where any token has them."""
    chunk_len = geometry.chunk_len
    intra = split_at_chunk_borders(query_start_loc, seq_lens, chunk_len)
    succ, inter = intra.take(intra.chunk >= 1), intra.take(intra.chunk >= 2)
    regions = [
        _Region(
            intra, intra.chunk * chunk_len, intra.offset + intra.length, np.zeros_like, True
        ),
        _Region(
            succ,
            (succ.chunk - 1) * chunk_len,
            np.full_like(succ.chunk, chunk_len),
            geometry.succ_turn,
        ),
        _Region(
            inter,
            np.zeros_like(inter.chunk),
            (inter.chunk - 1) * chunk_len,
            geometry.inter_turn,
        ),
    ]
    return [region for region in regions if len(region.segments.request)]


def _inverse(indices: IntArray, size: int) -> IntArray:
    """Where each of 0 .. size - 1 stands in `indices`, or -1."""
    places = np.full(size, -1)
    places[indices] = np.arange(len(indices))
    return places


def upload(groups: Sequence[Arrays], device: torch.device) -> list[dict[str, torch.Tensor]]:
    """Arrays on the device, copied all at once and without blocking.

    Each starts at a multiple of 16 bytes: for others Triton would compile its kernels again.

    Args:
        groups: [n] integers, which must fit 32 bits, or [n] fp32, by names.
        device: where to.

    Returns:
        For each group, int32 or fp32 by the same names.
    """
    ends = np.cumsum([-(-len(array) // 4) * 4 for group in groups for array in group.values()])
    starts = iter([0, *ends.tolist()])
    host = torch.empty(int(ends[-1]), dtype=torch.int32, pin_memory=device.type == "cuda")
    numbers = host.numpy()
    places = [{name: (next(starts), array) for name, array in each.items()} for each in groups]
    for group in places:
        for start, array in group.values():
            is_float = array.dtype == np.float32
            numbers[start : start + len(array)] = array.view(np.int32) if is_float else array
    on_device = host.to(device, non_blocking=True)
    of_dtype = on_device, on_device.view(torch.float32)
    return [
        {
            name: of_dtype[array.dtype == np.float32][start : start + len(array)]
            for name, (start, array) in group.items()
        }
        for group in places
    ]


def _slice_rows(
    block_table: torch.Tensor, request: torch.Tensor, first_page: torch.Tensor, pages: int
) -> torch.Tensor:
    """A block table of segments: `pages` columns of each one's request, from its first page.

    Past a segment's own pages any page will do, past the table too.
    """
    columns = first_page[:, None] + torch.arange(pages, device=block_table.device)
    columns.clamp_(max=block_table.shape[1] - 1)
    return block_table[request[:, None], columns]


def turns_of(
    position: IntArray,
    geometry: ChunkGeometry,
    original_max_position_embeddings: int | None,
    continuous: bool = False,
) -> Turns:
    """The turns of rows at these positions, [num_rows] int64.

    `continuous`: to positions that DCA does not clamp, with which Qwen's budgets select.
    """
    offset = position % geometry.chunk_len
    further = [np.zeros_like(offset), geometry.succ_turn(offset), geometry.inter_turn(offset)]
    if continuous:
        further[1:] = (
            np.full_like(offset, size) for size in (geometry.chunk_len, geometry.chunk_size)
        )
    temperature = None
    if original_max_position_embeddings is not None:
        temperature = torch.from_numpy(
            query_temperature(position, original_max_position_embeddings)
        )
    return Turns(torch.from_numpy(np.stack(further)), temperature)


def query_temperature(
    positions: IntArray, original_max_position_embeddings: int
) -> npt.NDArray[np.float32]:
    """Factor on the query at each absolute position, as Qwen-1M checkpoints want it.

    vLLM V0 put half of it on the keys, worked out from the request's length, so that a cached
    prefix was wrong for a request of another length; here all of it is the query's.
    """
    growth = np.log((positions + 1) / original_max_position_embeddings)
    return (np.maximum(0.1 * growth + 1, 1.0) ** 2).astype(np.float32)
