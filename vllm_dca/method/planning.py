"""From a batch's lengths to what the three attention passes need; once a step, for all layers.

The host knows the lengths exactly, so nothing here waits for a device: integers are worked
out in numpy and copied over without blocking. The block table, which only the device holds,
is gathered there.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from vllm_dca.method.geometry import ChunkGeometry, IntArray, Segments, split_at_chunk_borders
from vllm_dca.method.provider import PagedSegments


@dataclass
class QueryTurns:
    """Which rotated copies of the queries a batch needs, all passes one after the other.

    Attributes:
        tokens: [num_turned] int32, index of the token to take the query from.
        turn: [num_turned] int32, positions to turn it further, 0 .. c.
        temperature: [num_turned] fp32, factor to scale it by; None where there is none.
        sizes: how many copies belong to each pass that needs copies.
    """

    tokens: torch.Tensor
    turn: torch.Tensor
    temperature: torch.Tensor | None
    sizes: list[int]


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
        turns: copies for each pass but the first, and with a temperature for the first too;
            None where nothing is copied.
    """

    passes: list[PagedSegments]
    parts: list[Part]
    turns: QueryTurns | None


def plan_prefill(
    query_start_loc: npt.ArrayLike,
    seq_lens: npt.ArrayLike,
    block_table: torch.Tensor,
    block_size: int,
    geometry: ChunkGeometry,
    original_max_position_embeddings: int | None = None,
) -> PrefillPlan:
    """Plan the passes over requests that have any number of new tokens each.

    Args:
        query_start_loc: [num_requests + 1] on the host, first new token of each request,
            counted from the first prefill token.
        seq_lens: [num_requests] on the host, tokens of each request, cached and new.
        block_table: [num_requests, max_blocks] int32 on the device, pages of each request.
        block_size: tokens a page; divides the chunk length.
        geometry: the chunk sizes.
        original_max_position_embeddings: switches the temperature on.
    """
    length = original_max_position_embeddings
    regions = _regions(query_start_loc, seq_lens, geometry)
    copied = regions[1:] if length is None else regions
    tokens = [region.segments.token_indices() for region in regions]
    host: dict[str, npt.NDArray[np.generic]] = {}
    for index, region in enumerate(regions):
        host |= {
            f"cu_seqlens_q {index}": np.append(0, region.segments.length.cumsum()),
            f"cu_seqlens_k {index}": np.append(0, region.num_keys.cumsum()),
            f"seqused_k {index}": region.num_keys,
            f"request {index}": region.segments.request,
            f"first_page {index}": region.first_key // block_size,
        }
    for index in range(1, len(regions)):
        host[f"rows {index}"] = _inverse(tokens[index], len(tokens[0]))
    sizes = [len(indices) for indices in tokens[len(regions) - len(copied) :]]
    if copied:
        host["tokens"] = np.concatenate(tokens[len(regions) - len(copied) :])
        host["turn"] = np.concatenate(
            [region.turn(region.segments.token_offsets()) for region in copied]
        )
    if length is not None:
        positions = np.concatenate([region.segments.token_positions() for region in copied])
        host["temperature"] = query_temperature(positions, length).view(np.int32)
    device = upload(host, block_table.device)

    turns, answered = None, []
    if copied:
        # The intra pass answers all tokens, in order.
        answered = list(device["tokens"].split(sizes))[1 - len(regions) :]
        temperature = device.get("temperature")
        turns = QueryTurns(
            tokens=device["tokens"],
            turn=device["turn"],
            temperature=None if temperature is None else temperature.view(torch.float32),
            sizes=sizes,
        )
    return PrefillPlan(
        passes=[
            PagedSegments(
                query_lens=region.segments.length,
                key_lens=region.num_keys,
                cu_seqlens_q=device[f"cu_seqlens_q {index}"],
                cu_seqlens_k=device[f"cu_seqlens_k {index}"],
                seqused_k=device[f"seqused_k {index}"],
                block_table=_slice_rows(
                    block_table,
                    device[f"request {index}"],
                    device[f"first_page {index}"],
                    -(-int(region.num_keys.max()) // block_size),
                ),
                causal=index == 0,
            )
            for index, region in enumerate(regions)
        ],
        parts=[
            Part(answered[index - 1], device[f"rows {index}"])
            for index in range(1, len(regions))
        ],
        turns=turns,
    )


class _Region(NamedTuple):
    """One pass: segments, which keys each reads, and how far a query at an offset turns."""

    segments: Segments
    first_key: IntArray
    num_keys: IntArray
    turn: Callable[[IntArray], IntArray]


def _regions(
    query_start_loc: npt.ArrayLike, seq_lens: npt.ArrayLike, geometry: ChunkGeometry
) -> list[_Region]:
    """Intra, then succ and inter where any token has them."""
    chunk_len = geometry.chunk_len
    intra = split_at_chunk_borders(query_start_loc, seq_lens, chunk_len)
    succ, inter = intra.take(intra.chunk >= 1), intra.take(intra.chunk >= 2)
    regions = [
        _Region(intra, intra.chunk * chunk_len, intra.offset + intra.length, np.zeros_like),
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


def upload(
    arrays: dict[str, npt.NDArray[np.generic]], device: torch.device
) -> dict[str, torch.Tensor]:
    """Integer arrays as int32 on the device, copied at once and without blocking.

    Each starts at a multiple of 16 bytes: for others Triton would compile its kernels again.
    """
    ends = np.cumsum([-(-len(array) // 4) * 4 for array in arrays.values()]).tolist()
    host = torch.empty(ends[-1], dtype=torch.int32, pin_memory=device.type == "cuda")
    places = {
        name: slice(start, start + len(array))
        for (name, array), start in zip(arrays.items(), [0, *ends], strict=False)
    }
    for name, array in arrays.items():
        host.numpy()[places[name]] = array
    on_device = host.to(device, non_blocking=True)
    return {name: on_device[place] for name, place in places.items()}


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
