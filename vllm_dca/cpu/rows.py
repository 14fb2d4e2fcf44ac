"""A batch's new tokens one by one, where each stands and how far its query turns."""

from typing import NamedTuple

import torch

from vllm_dca.method.geometry import ChunkGeometry
from vllm_dca.method.planning import turns_of


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
        """From the arguments of `vllm_dca.cpu.plan_decode.DecodePlan`."""
        starts = query_start_loc.long()
        request = torch.arange(len(seq_lens)).repeat_interleave(starts.diff())
        row = torch.arange(len(request))
        position = seq_lens.long()[request] - (starts[request + 1] - row)
        length = original_max_position_embeddings
        return cls(request, position, *turns_of(position.numpy(), geometry, length))
