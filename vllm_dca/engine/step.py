"""What the layers are told of a step."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch


@dataclass
class DcaMetadata:
    """A step's batch, decode rows first; either part may be absent.

    Attributes:
        num_decode_tokens: how many rows `decode` answers.
        num_actual_tokens: how many it and `prefill` answer together.
        decode: a plan of the device's planner.
        prefill: a plan of the rest, by the device too.
        sparse: what sparse layers do instead, where a part of the batch is sparse.
        plan_again: makes `decode` anew, from the lengths that are on the device by then.
    """

    num_decode_tokens: int
    num_actual_tokens: int
    decode: Any
    prefill: Any
    sparse: "SparseStep | None" = None
    plan_again: Callable[[], Any] | None = None


class SparseStep(NamedTuple):
    """A step with sparse segments.

    Attributes:
        plan: of the segments, as the layers' `SparsePrefill` has it.
        tokens: [num_tokens] int32, the batch's other tokens.
        rest: these, as a batch of their own.
        sampled: whether layers show what they keep.
    """

    plan: Any
    tokens: torch.Tensor
    rest: DcaMetadata
    sampled: bool
