"""What an attention layer runs: its keys and values stored, its queries answered."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from vllm.v1.attention.backend import AttentionImpl, AttentionLayer, AttentionType

from vllm_dca.engine.refusals import REFUSED_IN_LAYERS
from vllm_dca.engine.sparse_metrics import RecallSampler
from vllm_dca.engine.step import DcaMetadata
from vllm_dca.method.device import Device
from vllm_dca.method.kv_cache import split_kv, split_pages
from vllm_dca.method.rotary import QueryRotation
from vllm_dca.method.sparse_prefill import SparsePrefill
from vllm_dca.method.sparse_recall import Watch
from vllm_dca.method.vertical_slash import Rule


class Prepared(NamedTuple):
    """What a layer knows once the whole model is built.

    Attributes:
        rotation: how to turn its queries.
        device: how to run.
        cache_dtype: of the KV cache.
    """

    rotation: QueryRotation
    device: Device
    cache_dtype: torch.dtype


@dataclass
class PreparedSparse:
    """The same of a layer that prefills sparsely.

    Attributes:
        rule: how its lines are selected.
        prefill: how it runs.
        sampler: of all such layers; says which steps are sampled.
        watch: is shown what the layer did in these.
    """

    rule: Rule
    prefill: SparsePrefill
    sampler: RecallSampler
    watch: Watch


class DcaImpl(AttentionImpl[DcaMetadata]):
    """DCA of one layer.

    Attributes:
        prepared: see there; None until the model is built.
        sparse: likewise; None for good where all attention is dense.
        block_size: tokens a page as steps are planned, set by `DcaMetadataBuilder`; a cache's
            pages are split into such.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
        chunk_lookback: int = -1,
        **extra: Any,
    ) -> None:
        given = {
            "alibi_slopes": alibi_slopes,
            "sliding_window": sliding_window,
            "chunk_lookback": None if chunk_lookback == -1 else chunk_lookback,
            "kv_sharing_target_layer_name": kv_sharing_target_layer_name,
            **extra,
        }
        refused = [
            REFUSED_IN_LAYERS.get(name, f"the attention argument {name!r}")
            for name, value in given.items()
            if value is not None
        ]
        if attn_type != AttentionType.DECODER:
            refused.append(f"{attn_type} attention")
        if refused:
            raise NotImplementedError(
                "--attention-backend dca cannot serve this model: a layer has "
                f"{', '.join(refused)}. Use another attention backend."
            )
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = scale
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.soft_cap = logits_soft_cap or None
        self.sinks = sinks
        self.prepared: Prepared | None = None
        self.sparse: PreparedSparse | None = None
        self.block_size: int | None = None

    def prepare(
        self, rotation: QueryRotation, device: Device, cache_dtype: torch.dtype
    ) -> None:
        """Settle what shows only when the whole model is there; before the first step."""
        self.prepared = Prepared(rotation, device, cache_dtype)

    def prepare_sparse(
        self, rule: Rule, prefill: SparsePrefill, sampler: RecallSampler
    ) -> None:
        """Settle what a layer with sparse prefill needs besides; before the first step."""
        self.sparse = PreparedSparse(rule, prefill, sampler, sampler.watch)

    def do_kv_cache_update(
        self,
        layer: AttentionLayer,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Store the step's keys and values, before `forward`."""
        assert self.prepared is not None
        self.prepared.device.write_kv(
            key,
            value,
            split_pages(kv_cache, self.block_size or kv_cache.shape[2]),
            slot_mapping,
            self.kv_cache_dtype,
            layer._k_scale,
            layer._v_scale,
        )

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: DcaMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend over the cache; shapes as in vLLM's AttentionImpl.

        Args:
            layer: has the scales of an FP8 cache.
            query: [num_tokens, num_heads, head_size], rotated to the offsets in the chunks.
            key: unused, in the cache already.
            value: unused, in the cache already.
            kv_cache: [num_blocks, num_kv_heads, block_size, 2 * head_size].
            attn_metadata: None in profiling, where no cache exists.
            output: [num_tokens, num_heads, head_size], written up to the batch's tokens.
            output_scale: must be None.
            output_block_scale: must be None.
        """
        if attn_metadata is None:
            # vLLM sizes the KV cache by what this run takes at its peak.
            query.new_empty(self.room(), *query.shape)
            return output.zero_()
        assert self.prepared is not None
        assert output_scale is None
        assert output_block_scale is None
        kv_cache = split_pages(kv_cache, self.block_size or kv_cache.shape[2])
        scales: dict[str, Any] = {"k_scale": None, "v_scale": None}
        if self.prepared.cache_dtype != query.dtype:
            kv_cache = kv_cache.view(self.prepared.cache_dtype)
            scales = {"k_scale": layer._k_scale, "v_scale": layer._v_scale}
        step = attn_metadata.sparse
        if self.sparse is None or step is None:
            self._attend(query, kv_cache, output, attn_metadata, scales)
            return output
        self.sparse.prefill.attend(
            query,
            kv_cache,
            output,
            plan=step.plan,
            rule=self.sparse.rule,
            rotation=self.prepared.rotation,
            softmax_scale=self.scale,
            watch=self.sparse.watch if step.sampled else None,
            **scales,
        )
        rest = query[step.tokens]
        if len(rest):
            attended = torch.empty(
                len(rest), *output.shape[1:], dtype=output.dtype, device=output.device
            )
            self._attend(rest, kv_cache, attended, step.rest, scales)
            output[step.tokens] = attended
        return output

    def room(self) -> int:
        """Scratch memory of `forward`: how many tensors of the queries' size, at most.

        A layer that was not prepared is refused when steps are planned, which is later.
        """
        prefill = None if self.prepared is None else self.prepared.device.prefill
        dense = 0 if prefill is None else prefill.room
        if self.sparse is None:
            return dense
        # The dense rest of a step is copied, and so is its answer.
        return max(self.sparse.prefill.room, 2 + dense)

    def _attend(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        output: torch.Tensor,
        metadata: DcaMetadata,
        scales: dict[str, Any],
    ) -> None:
        """Dense: decode rows, then prefills."""
        assert self.prepared is not None
        rotation, device, _ = self.prepared
        decode_tokens, all_tokens = metadata.num_decode_tokens, metadata.num_actual_tokens
        if metadata.decode is not None:
            device.decode(
                query[:decode_tokens],
                kv_cache,
                output[:decode_tokens],
                plan=metadata.decode,
                rotation=rotation,
                softmax_scale=self.scale,
                soft_cap=self.soft_cap,
                sinks=self.sinks,
                **scales,
            )
        if metadata.prefill is not None:
            assert device.prefill is not None
            key_cache, value_cache = split_kv(kv_cache)
            device.prefill.attend(
                query[decode_tokens:all_tokens],
                key_cache,
                value_cache,
                output[decode_tokens:all_tokens],
                plan=metadata.prefill,
                rotation=rotation,
                softmax_scale=self.scale,
                soft_cap=self.soft_cap,
                sinks=self.sinks,
                **scales,
            )
