"""What a device must be able to do; `vllm_dca.cpu.device` and `vllm_dca.cuda.device` can."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from vllm_dca.method.config import DcaSettings
from vllm_dca.method.provider import AttentionProvider
from vllm_dca.method.rotary import QueryRotation
from vllm_dca.method.sparse import SparsePrefill, SparseSizes

# From query_start_loc, seq_lens, block_table and the number of rows to a plan for `decode`.
DecodePlanner = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], Any]


class Partial(NamedTuple):
    """Attention of some of the queries over some of the keys.

    Attributes:
        output: [num_queries, num_heads, head_size].
        lse: [num_heads, num_queries] fp32, natural-log log-sum-exp of the scaled scores.
        tokens: [num_queries] integer, which queries these are, ascending.
        rows: [num_tokens] integer, where each query is among these, or -1; says the same.
    """

    output: torch.Tensor
    lse: torch.Tensor
    tokens: torch.Tensor
    rows: torch.Tensor


class PrefillOperations(NamedTuple):
    """What a prefill is put together from.

    Attributes:
        turn: `vllm_dca.method.rotary.turn_queries` or a function like it.
        attend: computes each pass.
        merge: `vllm_dca.cpu.merge.merge_parts` or a function like it. It adds the sinks, so
            that no pass has to know them.
    """

    turn: Callable[
        [torch.Tensor, QueryRotation, torch.Tensor, torch.Tensor, torch.Tensor | None],
        torch.Tensor,
    ]
    attend: AttentionProvider
    merge: Callable[..., None]


class Prefill(NamedTuple):
    """How prefills are answered.

    Attributes:
        plan: from a batch's lengths to what `attend` wants, once a step for all layers; its
            arguments are those of `vllm_dca.method.planning.plan_prefill`.
        attend: one layer; its arguments are those of
            `vllm_dca.method.prefill.prefill_attention`, but for `operations`.
        room: how many tensors of the queries' size `attend` has at once beside its arguments,
            at most.
    """

    plan: Callable[..., Any]
    attend: Callable[..., None]
    room: int = 0


class Device(NamedTuple):
    """How a device runs DCA.

    Attributes:
        provider: name of the prefill's attention provider, for people to read.
        prefill: how prefills are answered; None if `decode` takes any number of new tokens, so
            that prefills are planned and run as decodes are.
        write_kv: stores new keys and values: as `vllm_dca.method.kv_cache.write_kv`, with the
            KV cache's dtype in vLLM's word, and the scales of its keys and its values.
        decode_planner: makes a planner from the settings, the block size, the most rows that
            a step has, and how many query heads share a KV head.
        decode: attends from a few new tokens a request, or from any where `prefill` is None;
            see `vllm_dca.cpu.decode`.
        decode_rows: up to how many new tokens of a request `decode` takes rather than
            `prefill`, where so many query heads share a KV head.
        sparse: makes ready for sparse prefill of layers; None where there is none.
    """

    provider: str
    prefill: Prefill | None
    write_kv: Callable[..., None]
    decode_planner: Callable[[DcaSettings, int, int, int], DecodePlanner]
    decode: Callable[..., None]
    decode_rows: Callable[[int], int]
    sparse: Callable[[SparseSizes], SparsePrefill] | None = None
