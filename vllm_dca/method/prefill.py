"""Dual chunk attention over any number of new tokens: three passes and one merge.

The same for every device; what differs are the operations that it is put together from.
"""

import functools

import torch

from vllm_dca.method.device import Partial, Prefill, PrefillOperations
from vllm_dca.method.planning import PrefillPlan, plan_prefill
from vllm_dca.method.rotary import QueryRotation


def prefill_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    output: torch.Tensor,
    *,
    plan: PrefillPlan,
    rotation: QueryRotation,
    softmax_scale: float,
    operations: PrefillOperations,
    soft_cap: float | None = None,
    sinks: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:
    """See `vllm_dca.method.device.PrefillAttention`; `operations` are the device's."""
    queries = [query]
    turns = plan.turns
    if turns is not None:
        turned = operations.turn(query, rotation, turns.tokens, turns.turn, turns.temperature)
        queries = list(turned.split(plan.turn_sizes))
        if turns.temperature is None:
            queries.insert(0, query)

    def attend(index: int, output: torch.Tensor) -> torch.Tensor:
        return operations.attend(
            queries[index],
            key_cache,
            value_cache,
            output,
            segments=plan.passes[index],
            softmax_scale=softmax_scale,
            soft_cap=soft_cap,
            k_scale=k_scale,
            v_scale=v_scale,
        )

    lse = attend(0, output)
    parts = []
    for index, (tokens, rows) in enumerate(plan.parts, start=1):
        part_output = torch.empty_like(queries[index])
        parts.append(Partial(part_output, attend(index, part_output), tokens, rows))
    operations.merge(output, lse, parts, sinks)


def by_passes(operations: PrefillOperations) -> Prefill:
    """Three passes and a merge, put together from a device's operations."""
    attend = functools.partial(prefill_attention, operations=operations)
    # Queries turned three ways, two parts, and what is smaller than one: log-sum-exps.
    return Prefill(plan_prefill, attend, room=6)
