"""What one launch over a batch's prefills needs to know; once a step, for all layers."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from vllm_dca.method.geometry import ChunkGeometry, split_at_chunk_borders
from vllm_dca.method.planning import Arrays, upload


@dataclass
class PrefillWalk:
    """Runs of new tokens of one request inside one chunk, on the device.

    Attributes:
        cu_seqlens_q: [num_segments + 1] int32, first token of each.
        request: [num_segments] int32, whose it is.
        chunk: [num_segments] int32, its number.
        offset: [num_segments] int32, where in the chunk its first token stands.
        block_table: [num_requests, max_blocks] int32, pages of each request.
        geometry: the chunk sizes.
        original_max_position_embeddings: switches the temperature on.
    """

    cu_seqlens_q: torch.Tensor
    request: torch.Tensor
    chunk: torch.Tensor
    offset: torch.Tensor
    block_table: torch.Tensor
    geometry: ChunkGeometry
    original_max_position_embeddings: int | None


def plan_walk(
    query_start_loc: npt.ArrayLike,
    seq_lens: npt.ArrayLike,
    block_table: torch.Tensor,
    block_size: int,
    geometry: ChunkGeometry,
    original_max_position_embeddings: int | None = None,
) -> PrefillWalk:
    """See `vllm_dca.method.device.PlanPrefill`; one copy."""
    segments = split_at_chunk_borders(query_start_loc, seq_lens, geometry.chunk_len)
    host: Arrays = {
        "cu_seqlens_q": np.append(0, segments.length.cumsum()),
        "request": segments.request,
        "chunk": segments.chunk,
        "offset": segments.offset,
    }
    [there] = upload([host], block_table.device)
    return PrefillWalk(
        **there,
        block_table=block_table,
        geometry=geometry,
        original_max_position_embeddings=original_max_position_embeddings,
    )
