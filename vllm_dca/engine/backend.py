"""vLLM's attention backend: what it can do, and the classes that do it."""

import math
from typing import TYPE_CHECKING, ClassVar

import torch
from vllm.config import VllmConfig, get_current_vllm_config_or_none
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionBackend, MultipleOf
from vllm.v1.kv_cache_interface import KVCacheLayout, KVCacheSpec

from vllm_dca.engine.impl import DcaImpl
from vllm_dca.engine.metadata import DcaMetadataBuilder
from vllm_dca.engine.remap import remap_layers
from vllm_dca.engine.settings import settings_of
from vllm_dca.engine.startup import configure
from vllm_dca.engine.support import KV_CACHE_DTYPES, cache_dtype_of, cache_name_of

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
        """Refuse cards without what is needed, and a cache of another dtype but for FP8."""
        if not cls.supports_compute_capability(device_capability):
            return (
                f"compute capability {device_capability.as_version_str()}: below 8.0 Triton "
                "compiles DCA's products without tensor cores; a card of 8.0 or higher works"
            )
        cache_dtype = cache_dtype_of(kv_cache_dtype or "auto", dtype)
        if cache_dtype == dtype:
            return None
        # By its name it goes before what a checkpoint asks for; float32 has none.
        works = cache_name_of(dtype) or "auto"
        if cache_dtype.itemsize > 1:
            return f"--kv-cache-dtype {kv_cache_dtype} with a {dtype} model; use {works}"
        if current_platform.is_cpu():
            return f"--kv-cache-dtype {kv_cache_dtype} on the CPU; use {works}"
        return None

    @classmethod
    def supports_sink(cls) -> bool:
        """One more logit of each softmax, added once, as its parts are merged."""
        return True

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
        pages that do not divide a chunk it then splits into some that do. Not on the CPU: what
        zeroes new pages there, CPUModelRunner._zero_block_ids, takes a page's number for that
        of a part, and would wipe out keys that are in use. There DCA splits them itself.
        """
        if current_platform.is_cpu():
            return [MultipleOf(1)]
        vllm_config = get_current_vllm_config_or_none()
        if kv_cache_spec is None or vllm_config is None:
            return [MultipleOf(16)]
        chunk_len = settings_of(vllm_config).geometry.chunk_len
        size = math.gcd(chunk_len, kv_cache_spec.block_size)
        return [MultipleOf(16) if size == kv_cache_spec.block_size else size]

    @classmethod
    def supports_compute_capability(cls, capability: "DeviceCapability | None") -> bool:
        """From Ampere on; `supports_combination` says why. None on the CPU."""
        return capability is None or capability.to_int() >= 80

    # The three hooks below are called by the shims in vllm_dca.engine.shims; patches/ proposes
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
        # Not cls: vLLM makes subclasses for layers that attend in another way.
        remap_layers(model, vllm_config, DcaBackend)
