"""A batch's new tokens one by one, where each stands and how far its query turns."""

from typing import NamedTuple

import torch

from vllm_dca.geometry import ChunkGeometry


class Rows(NamedTuple):
    """A step's new tokens, one a row.

    Attributes:
        request: [num_rows] whose they are.
        position: [num_rows] absolute, in tokens.
        turn: [3, num_rows] positions to turn each query further, for intra, succ and inter.
        temperature: [num_rows] fp32, factor to scale each by; None where there is none.
    """

    request: torch.Tensor
    position: torch.Tensor
    turn: torch.Tensor
    temperature: torch.Tensor | None

    @classmethod
    def of(
        cls,
        query_start_loc: torch.Tensor,
        seq_lens: torch.Tensor,
        geometry: ChunkGeometry,
        original_max_position_embeddings: int | None,
    ) -> "Rows":
        """From the arguments of `vllm_dca.decode_cpu.DecodePlan`."""
        starts = query_start_loc.long()
        request = torch.arange(len(seq_lens)).repeat_interleave(starts.diff())
        row = torch.arange(len(request))
        position = seq_lens.long()[request] - (starts[request + 1] - row)
        offset = position % geometry.chunk_len
        succ = (offset + geometry.chunk_len).clamp(max=geometry.chunk_size) - offset
        turn = torch.stack([torch.zeros_like(offset), succ, geometry.inter_position - offset])
        temperature = None
        if original_max_position_embeddings is not None:
            growth = ((position + 1) / original_max_position_embeddings).log()
            temperature = ((0.1 * growth + 1).clamp(min=1) ** 2).float()
        return cls(request, position, turn, temperature)
