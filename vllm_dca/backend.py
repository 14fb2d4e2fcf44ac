"""vLLM's attention backend: capabilities, metadata builder and implementation."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionLayer,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout

from vllm_dca.decode_cpu import DecodePlan, decode_attention
from vllm_dca.kv_cache import split_kv, write_kv
from vllm_dca.planning import PrefillPlan, plan_prefill
from vllm_dca.prefill import prefill_attention
from vllm_dca.providers import torch_cpu
from vllm_dca.rotary import QueryRotation
from vllm_dca.startup import KV_CACHE_DTYPES, configure, settings_of

if TYPE_CHECKING:
    from vllm.config.cache import CacheDType
    from vllm.platforms.interface import DeviceCapability

_TORCH_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


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
        """Refuse a cache of another dtype than the model's."""
        if _TORCH_DTYPES.get(kv_cache_dtype or "auto", dtype) != dtype:
            return f"--kv-cache-dtype {kv_cache_dtype} with a {dtype} model; use auto"
        return None

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Any, read through strides; the first keeps a page's heads apart, as products need."""
        return (
            KVCacheLayout.LBHNC,
            *(layout for layout in KVCacheLayout if layout != KVCacheLayout.LBHNC),
        )

    @classmethod
    def supports_kv_connector(cls) -> bool:
        """KV connectors are not proved yet."""
        return False

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


@dataclass
class DcaMetadata:
    """A step's batch, decode rows first; either part may be absent."""

    num_decode_tokens: int
    num_actual_tokens: int
    decode: DecodePlan | None
    prefill: PrefillPlan | None


class DcaMetadataBuilder(AttentionMetadataBuilder[DcaMetadata]):
    """Plans each step once for all the layers of a KV-cache group."""

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1)
        self.settings = settings_of(vllm_config)
        self.block_size = kv_cache_spec.block_size
        if self.settings.geometry.chunk_len % self.block_size:
            raise ValueError(
                f"DCA's chunk length {self.settings.geometry.chunk_len} is not a multiple of "
                f"the KV cache's block size {self.block_size}, which vLLM changed after "
                "start-up checks. Pass --block-size explicitly."
            )
        layers = vllm_config.compilation_config.static_forward_context
        unprepared = [name for name in layer_names if layers[name].impl.rotation is None]
        if unprepared:
            raise RuntimeError(
                f"DCA was not installed on {unprepared[0]} and {len(unprepared) - 1} other "
                f"layers: the model loader {vllm_config.load_config.load_format!r} does not "
                "build models through BaseModelLoader.create_model. Use --load-format auto."
            )

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> DcaMetadata:
        """Split the batch into decode rows and prefills, and plan both."""
        common = common_attn_metadata
        if common.causal is not True:
            raise NotImplementedError("DCA attends causally only.")
        num_decodes, num_prefills, num_decode_tokens, _ = split_decodes_and_prefills(
            common, decode_threshold=1
        )
        geometry = self.settings.geometry
        length = self.settings.original_max_position_embeddings
        decode = prefill = None
        if num_decodes:
            decode = DecodePlan(
                common.seq_lens[:num_decodes],
                common.block_table_tensor[:num_decodes],
                self.block_size,
                geometry,
                length,
            )
        if num_prefills:
            requests = slice(num_decodes, num_decodes + num_prefills)
            assert common.seq_lens_cpu_upper_bound is not None
            query_start_loc = common.query_start_loc_cpu[num_decodes:].numpy()
            prefill = plan_prefill(
                query_start_loc[: num_prefills + 1] - num_decode_tokens,
                common.seq_lens_cpu_upper_bound[requests].numpy(),
                common.block_table_tensor[requests],
                self.block_size,
                geometry,
                length,
            )
        return DcaMetadata(num_decode_tokens, common.num_actual_tokens, decode, prefill)


class DcaImpl(AttentionImpl[DcaMetadata]):
    """DCA of one layer.

    Attributes:
        rotation: how to turn this layer's queries; `vllm_dca.installation` sets it.
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
        refused = {
            "ALiBi slopes": alibi_slopes is not None,
            "sliding-window attention": sliding_window is not None,
            "a logit soft cap": bool(logits_soft_cap),
            f"{attn_type} attention": attn_type != AttentionType.DECODER,
            "KV sharing between layers": kv_sharing_target_layer_name is not None,
            **{
                f"the attention argument {name!r}": value is not None
                for name, value in extra.items()
            },
        }
        if any(refused.values()):
            raise NotImplementedError(
                "--attention-backend dca cannot serve this model: its attention has "
                f"{', '.join(name for name, present in refused.items() if present)}. "
                "Use another attention backend."
            )
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = scale
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.rotation: QueryRotation | None = None

    def do_kv_cache_update(
        self,
        layer: AttentionLayer,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Store the step's keys and values, before `forward`."""
        write_kv(key, value, kv_cache, slot_mapping)

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
            layer: unused; the cache is not quantised.
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
        assert output_scale is None
        assert output_block_scale is None
        decode_tokens = attn_metadata.num_decode_tokens
        all_tokens = attn_metadata.num_actual_tokens
        if attn_metadata.decode is not None:
            decode_attention(
                query[:decode_tokens],
                kv_cache,
                output[:decode_tokens],
                plan=attn_metadata.decode,
                rotation=self.rotation,
                softmax_scale=self.scale,
            )
        if attn_metadata.prefill is not None:
            key_cache, value_cache = split_kv(kv_cache)
            prefill_attention(
                query[decode_tokens:all_tokens],
                key_cache,
                value_cache,
                output[decode_tokens:all_tokens],
                plan=attn_metadata.prefill,
                rotation=self.rotation,
                softmax_scale=self.scale,
                provider=torch_cpu.attention,
            )
        return output
