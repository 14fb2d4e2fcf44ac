"""vLLM's attention backend: capabilities and implementation."""

import math
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from vllm.config import VllmConfig, get_current_vllm_config_or_none
from vllm.platforms import current_platform
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionLayer,
    AttentionType,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import KVCacheLayout, KVCacheSpec

from vllm_dca.devices import Device
from vllm_dca.kv_cache import split_kv
from vllm_dca.metadata import DcaMetadata, DcaMetadataBuilder
from vllm_dca.prefill import prefill_attention
from vllm_dca.rotary import QueryRotation
from vllm_dca.startup import cache_dtype_of, configure, settings_of
from vllm_dca.support import KV_CACHE_DTYPES, REFUSED_IN_LAYERS

if TYPE_CHECKING:
    from vllm.config.cache import CacheDType
    from vllm.platforms.interface import DeviceCapability


class DcaBackend(AttentionBackend):
    """Dual Chunk Attention over vLLM's paged KV cache, read through its strides."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [
        torch.float32,
        torch.bfloat16,
        torch.float16,
    ]
    supported_kv_cache_dtypes: ClassVar[list["CacheDType"]] = list(KV_CACHE_DTYPES)
    forward_includes_kv_cache_update: bool = False

    @staticmethod
    def get_name() -> str:
        """Name in vLLM's registry."""
        return "DCA"

    @staticmethod
    def get_impl_cls() -> type["DcaImpl"]:
        """What a layer runs."""
        return DcaImpl

    @staticmethod
    def get_builder_cls() -> type["DcaMetadataBuilder"]:
        """What prepares a step for all layers."""
        return DcaMetadataBuilder

    @classmethod
    def supports_combination(
        cls,
        head_size: int,
        dtype: torch.dtype,
        kv_cache_dtype: "CacheDType | None",
        block_size: int | None,
        use_mla: bool,
        has_sink: bool,
        use_sparse: bool,
        use_mm_prefix: bool,
        device_capability: "DeviceCapability",
    ) -> str | None:
        """Refuse a cache of another dtype than the model's, FP8 excepted where it can be."""
        cache_dtype = cache_dtype_of(kv_cache_dtype or "auto", dtype)
        if cache_dtype == dtype:
            return None
        if cache_dtype.itemsize > 1:
            return f"--kv-cache-dtype {kv_cache_dtype} with a {dtype} model; use auto"
        if current_platform.is_cpu():
            return f"--kv-cache-dtype {kv_cache_dtype} on the CPU; use auto"
        return None

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        """Any; what a provider cannot do is told when it is chosen."""
        return True

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Any, read through strides; the first keeps a page's heads apart, as products need."""
        return (
            KVCacheLayout.LBHNC,
            *(layout for layout in KVCacheLayout if layout != KVCacheLayout.LBHNC),
        )

    @staticmethod
    def get_supported_kernel_block_sizes(
        kv_cache_spec: KVCacheSpec | None = None,
    ) -> list[int | MultipleOf]:
        """Any on the CPU; flash-attention reads whole sixteens.

        For models with linear-attention layers vLLM raises the size after the start-up checks;
        pages that do not divide a chunk it then splits into some that do.
        """
        least = 1 if current_platform.is_cpu() else 16
        vllm_config = get_current_vllm_config_or_none()
        if kv_cache_spec is None or vllm_config is None:
            return [MultipleOf(least)]
        chunk_len = settings_of(vllm_config).geometry.chunk_len
        size = math.gcd(chunk_len, kv_cache_spec.block_size)
        return [MultipleOf(least) if size == kv_cache_spec.block_size else size]

    @classmethod
    def supports_compute_capability(cls, capability: "DeviceCapability | None") -> bool:
        """From Ampere on: before it, the kernels' registers spill. None on the CPU."""
        return capability is None or capability.to_int() >= 80

    # The three hooks below are called by the shims in vllm_dca.compat; patches/ proposes
    # them to vLLM.

    @classmethod
    def extends_context(cls) -> bool:
        """May be served past the length that the model's config derives."""
        return True

    @classmethod
    def verify_and_update_config(cls, vllm_config: VllmConfig) -> None:
        """Settle DCA's settings, or refuse, before anything is loaded."""
        configure(vllm_config)

    @classmethod
    def prepare_model(cls, model: torch.nn.Module, vllm_config: VllmConfig) -> None:
        """Give the model's DCA layers their rotary tables, before the weights are loaded."""
        from vllm_dca.installation import install

        install(model, vllm_config)


class DcaImpl(AttentionImpl[DcaMetadata]):
    """DCA of one layer.

    Attributes:
        rotation: how to turn this layer's queries.
        device: how to run; `vllm_dca.installation` sets both.
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
        **extra: Any,
    ) -> None:
        given = {
            "alibi_slopes": alibi_slopes,
            "sliding_window": sliding_window,
            "logits_soft_cap": logits_soft_cap or None,
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
                "--attention-backend dca cannot serve this model: its attention has "
                f"{', '.join(refused)}. Use another attention backend."
            )
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = scale
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.rotation: QueryRotation | None = None
        self.device: Device | None = None

    def do_kv_cache_update(
        self,
        layer: AttentionLayer,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Store the step's keys and values, before `forward`."""
        assert self.device is not None
        self.device.write_kv(layer, key, value, kv_cache, slot_mapping, self.kv_cache_dtype)

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
            return output.zero_()
        assert self.rotation is not None
        assert self.device is not None
        assert output_scale is None
        assert output_block_scale is None
        scales: dict[str, torch.Tensor | None] = {"k_scale": None, "v_scale": None}
        cache_dtype = cache_dtype_of(self.kv_cache_dtype, query.dtype)
        if cache_dtype != query.dtype:
            kv_cache = kv_cache.view(cache_dtype)
            scales = {"k_scale": layer._k_scale, "v_scale": layer._v_scale}
        decode_tokens = attn_metadata.num_decode_tokens
        all_tokens = attn_metadata.num_actual_tokens
        if attn_metadata.decode is not None:
            self.device.decode(
                query[:decode_tokens],
                kv_cache,
                output[:decode_tokens],
                plan=attn_metadata.decode,
                rotation=self.rotation,
                softmax_scale=self.scale,
                **scales,
            )
        if attn_metadata.prefill is not None:
            assert self.device.prefill is not None
            key_cache, value_cache = split_kv(kv_cache)
            prefill_attention(
                query[decode_tokens:all_tokens],
                key_cache,
                value_cache,
                output[decode_tokens:all_tokens],
                plan=attn_metadata.prefill,
                rotation=self.rotation,
                softmax_scale=self.scale,
                operations=self.device.prefill,
                **scales,
            )
        return output
