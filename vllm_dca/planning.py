"""From a batch's lengths to what the three attention passes need; once a step, for all layers.

The host knows the lengths exactly, so nothing here waits for a device: integers are worked
out in numpy and copied over without blocking. The block table, which only the device holds,
is gathered there.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from vllm_dca.geometry import ChunkGeometry, IntArray, Segments, split_at_chunk_borders


@dataclass
class AttentionPass:
    """One call of an attention provider over segments, in the terms of flash-attention.

    Attributes:
        cu_seqlens_q: [num_segments + 1] int32, first query of each segment.
        seqused_k: [num_segments] int32, keys that each segment reads.
        block_table: [num_segments, max_blocks] int32, their pages; entries past seqused_k
            are valid page numbers that mean nothing.
        max_seqlen_q: longest segment in queries.
        max_seqlen_k: longest segment in keys.
        causal: masked so that the last query sees the last key.
        tokens: [num_queries] int64, which prefill tokens the queries are; None for all, in
            order.
    """

    cu_seqlens_q: torch.Tensor
    seqused_k: torch.Tensor
    block_table: torch.Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    causal: bool
    tokens: torch.Tensor | None


@dataclass
class QueryTurns:
    """Which rotated copies of the queries a batch needs, all passes one after the other.

    Attributes:
        tokens: [num_turned] int64, index of the token to take the query from.
        turn: [num_turned] int64, positions to turn it further, 0 .. c.
        temperature: [num_turned] fp32, factor to scale it by; None where there is none.
        sizes: how many copies belong to each pass.
    """

    tokens: torch.Tensor
    turn: torch.Tensor
    temperature: torch.Tensor | None
    sizes: list[int]


@dataclass
class PrefillPlan:
    """Passes over a batch's prefill tokens: intra first, succ and inter where needed.

    With a temperature the intra queries are copies too (turned by 0); else they are the
    query tensor itself, and `turns.sizes` starts with 0.
    """

    passes: list[AttentionPass]
    turns: QueryTurns


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
    device = block_table.device

    def to_device(array: npt.NDArray[np.generic]) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        if device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(device, non_blocking=True)

    chunk_len = geometry.chunk_len
    segments = split_at_chunk_borders(query_start_loc, seq_lens, chunk_len)
    with_succ, with_inter = (
        segments.take(segments.chunk >= 1),
        segments.take(segments.chunk >= 2),
    )

    def attention_pass(
        part: Segments, first_key: IntArray, num_keys: IntArray, whole: bool
    ) -> AttentionPass:
        blocks = -(-int(num_keys.max()) // block_size)
        columns = to_device(first_key // block_size)[:, None] + torch.arange(
            blocks, device=device
        )
        rows = to_device(part.request)[:, None]
        return AttentionPass(
            cu_seqlens_q=to_device(np.append(0, part.length.cumsum()).astype(np.int32)),
            seqused_k=to_device(num_keys.astype(np.int32)),
            block_table=block_table[rows, columns.clamp(max=block_table.shape[1] - 1)],
            max_seqlen_q=int(part.length.max()),
            max_seqlen_k=int(num_keys.max()),
            causal=whole,
            tokens=None if whole else to_device(part.token_indices()),
        )

    own_chunk = segments.chunk * chunk_len
    passes = [
        attention_pass(segments, own_chunk, segments.offset + segments.length, whole=True)
    ]
    if len(with_succ.request):
        start = (with_succ.chunk - 1) * chunk_len
        passes.append(
            attention_pass(with_succ, start, np.full_like(start, chunk_len), whole=False)
        )
    if len(with_inter.request):
        end = (with_inter.chunk - 1) * chunk_len
        passes.append(attention_pass(with_inter, np.zeros_like(end), end, whole=False))

    scaled = original_max_position_embeddings is not None
    copies = [segments if scaled else segments.take(np.zeros(len(segments.request), bool))]
    copies += [with_succ, with_inter]
    offsets = [part.token_offsets() for part in copies]
    turns = [
        np.zeros_like(offsets[0]),
        geometry.succ_turn(offsets[1]),
        geometry.inter_turn(offsets[2]),
    ]
    temperature = None
    if original_max_position_embeddings is not None:
        positions = [
            np.repeat(part.chunk * chunk_len, part.length) + offset
            for part, offset in zip(copies, offsets, strict=True)
        ]
        temperature = to_device(
            query_temperature(np.concatenate(positions), original_max_position_embeddings)
        )
    return PrefillPlan(
        passes=passes,
        turns=QueryTurns(
            tokens=to_device(np.concatenate([part.token_indices() for part in copies])),
            turn=to_device(np.concatenate(turns)),
            temperature=temperature,
            sizes=[len(offset) for offset in offsets],
        ),
    )


def query_temperature(
    positions: IntArray, original_max_position_embeddings: int
) -> npt.NDArray[np.float32]:
    """Factor on the query at each absolute position, as Qwen-1M checkpoints want it.

    vLLM V0 put half of it on the keys, worked out from the request's length, so that a cached
    prefix was wrong for a request of another length; here all of it is the query's.
    """
    growth = np.log((positions + 1) / original_max_position_embeddings)
    return (np.maximum(0.1 * growth + 1, 1.0) ** 2).astype(np.float32)
