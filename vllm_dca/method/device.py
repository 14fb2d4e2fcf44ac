"""What a device must be able to do; `vllm_dca.cpu.device` and `vllm_dca.cuda.device` can.

Everywhere the KV cache is [num_blocks, num_kv_heads, block_size, 2 * head_size] in any physical
order with the last axis dense, and holds the new tokens' keys and values before they attend.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy.typing as npt
import torch

from vllm_dca.method.config import DcaSettings
from vllm_dca.method.geometry import ChunkGeometry
from vllm_dca.method.provider import AttentionProvider
from vllm_dca.method.rotary import QueryRotation
from vllm_dca.method.sparse_prefill import SparsePrefill, SparseSizes


class WriteKV(Protocol):
    """Stores new keys and values."""

    def __call__(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
        kv_cache_dtype: str,
        k_scale: torch.Tensor,
        v_scale: torch.Tensor,
    ) -> None:
        """Store.

        Args:
            key: [num_tokens, num_kv_heads, head_size], rotated.
            value: like key.
            kv_cache: written.
            slot_mapping: as `vllm_dca.method.kv_cache.write_kv` has it.
            kv_cache_dtype: of the cache, in vLLM's word.
            k_scale: [1] fp32, what keys of an FP8 cache are divided by.
            v_scale: likewise.
        """


class PlanDecode(Protocol):
    """Makes a plan for `DecodeAttention`, once a step for all layers."""

    def __call__(
        self,
        query_start_loc: torch.Tensor,
        seq_lens: torch.Tensor,
        block_table: torch.Tensor,
        num_rows: int,
        max_query_len: int | None = None,
    ) -> Any:
        """Plan a step.

        Args:
            query_start_loc: [num_requests + 1] int32 on the device, first row of each request.
            seq_lens: [num_requests] int32 on the device, tokens of each, the new included.
            block_table: [num_requests, max_blocks] int32 on the device.
            num_rows: rows to answer; those past the last request's are padding.
            max_query_len: rows of a request, at most; None if it is not known.
        """


class DecodeAttention(Protocol):
    """Attends from a few new tokens of each request, or from any number: `Device` says."""

    def __call__(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        output: torch.Tensor,
        *,
        plan: Any,
        rotation: QueryRotation,
        softmax_scale: float,
        soft_cap: float | None = None,
        sinks: torch.Tensor | None = None,
        k_scale: torch.Tensor | None = None,
        v_scale: torch.Tensor | None = None,
    ) -> None:
        """Attend from each row to all keys up to its own.

        Args:
            query: [num_rows, num_heads, head_size], rotated to their offsets.
            kv_cache: of the query's dtype, or FP8 where the device can.
            output: [num_rows, num_heads, head_size], written.
            plan: made by the device's planner.
            rotation: how this layer turns queries.
            softmax_scale: factor on the dot products.
            soft_cap: scaled scores become soft_cap * tanh(score / soft_cap).
            sinks: [num_heads], one more logit of each row's softmax, whose value is 0.
            k_scale: [1] fp32, what FP8 keys are multiplied by; None for a cache of the query's
                dtype.
            v_scale: like k_scale, for the values.
        """


class PlanPrefill(Protocol):
    """Makes a plan for `PrefillAttention`, once a step for all layers."""

    def __call__(
        self,
        query_start_loc: npt.ArrayLike,
        seq_lens: npt.ArrayLike,
        block_table: torch.Tensor,
        block_size: int,
        geometry: ChunkGeometry,
        original_max_position_embeddings: int | None = None,
    ) -> Any:
        """Plan requests that have any number of new tokens each.

        Args:
            query_start_loc: [num_requests + 1] on the host, first new token of each request,
                counted from the first prefill token.
            seq_lens: [num_requests] on the host, tokens of each request, cached and new.
            block_table: [num_requests, max_blocks] int32 on the device.
            block_size: tokens a page; divides the chunk length.
            geometry: the chunk sizes.
            original_max_position_embeddings: switches the temperature on.
        """


class PrefillAttention(Protocol):
    """Attends from any number of new tokens."""

    def __call__(
        self,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        output: torch.Tensor,
        *,
        plan: Any,
        rotation: QueryRotation,
        softmax_scale: float,
        soft_cap: float | None = None,
        sinks: torch.Tensor | None = None,
        k_scale: torch.Tensor | None = None,
        v_scale: torch.Tensor | None = None,
    ) -> None:
        """Attend from each token to all keys up to its own.

        Args:
            query: [num_tokens, num_heads, head_size], rotated to their offsets.
            key_cache: [num_blocks, block_size, num_kv_heads, head_size], see
                `AttentionProvider`.
            value_cache: like key_cache.
            output: [num_tokens, num_heads, head_size], written.
            plan: made by the device's `PlanPrefill`.
            rotation, softmax_scale, soft_cap, sinks, k_scale, v_scale: as `DecodeAttention`
                has them.
        """


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


class MergeParts(Protocol):
    """Merges attention over other keys into the output."""

    def __call__(
        self,
        output: torch.Tensor,
        lse: torch.Tensor,
        parts: list[Partial],
        sinks: torch.Tensor | None = None,
    ) -> None:
        """Merge.

        Args:
            output: [num_tokens, num_heads, head_size], attention over the first set of keys, at
                least one a query; becomes attention over all sets.
            lse: [num_heads, num_tokens] fp32, of the first set.
            parts: the other sets; all are disjoint.
            sinks: [num_heads], the LSE of one more set, whose values are 0.
        """


class TurnQueries(Protocol):
    """`vllm_dca.method.rotary.turn_queries`, or a function like it."""

    def __call__(
        self,
        query: torch.Tensor,
        rotation: QueryRotation,
        tokens: torch.Tensor,
        turn: torch.Tensor,
        temperature: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Copies of some queries, turned further."""
        ...


class PrefillOperations(NamedTuple):
    """What a prefill by passes is put together from.

    Attributes:
        turn: turns queries.
        attend: computes each pass.
        merge: merges the passes. It adds the sinks, so that no pass has to know them.
    """

    turn: TurnQueries
    attend: AttentionProvider
    merge: MergeParts


class Prefill(NamedTuple):
    """How prefills are answered.

    Attributes:
        plan: a step, for all layers.
        attend: one layer.
        room: how many tensors of the queries' size `attend` has at once beside its arguments,
            at most.
    """

    plan: PlanPrefill
    attend: PrefillAttention
    room: int = 0


class Device(NamedTuple):
    """How a device runs DCA.

    Attributes:
        provider: name of the prefill's attention provider, for people to read.
        prefill: how prefills are answered; None if `decode` takes any number of new tokens, so
            that prefills are planned and run as decodes are.
        write_kv: stores new keys and values.
        decode_planner: makes a planner from the settings, the block size, the most rows that
            a step has, and how many query heads share a KV head.
        decode: attends from a few new tokens a request, or from any where `prefill` is None.
        decode_rows: up to how many new tokens of a request `decode` takes rather than
            `prefill`, where so many query heads share a KV head.
        sparse: makes ready for sparse prefill of layers.
    """

    provider: str
    prefill: Prefill | None
    write_kv: WriteKV
    decode_planner: Callable[[DcaSettings, int, int, int], PlanDecode]
    decode: DecodeAttention
    decode_rows: Callable[[int], int]
    sparse: Callable[[SparseSizes], SparsePrefill]
