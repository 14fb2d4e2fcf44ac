"""A GPU as a device of DCA: Triton kernels around whichever provider attends the passes."""

from collections.abc import Callable

import torch

from vllm_dca.cuda import decode, merge, plan_decode, turn
from vllm_dca.method.config import DcaSettings
from vllm_dca.method.device import DecodePlanner, Device, PrefillOperations
from vllm_dca.method.kv_cache import split_kv
from vllm_dca.method.provider import AttentionProvider


def with_provider(
    provider: str,
    attend: AttentionProvider,
    reshape_and_cache: Callable[..., None],
    num_multiprocessors: int,
    device: torch.device,
) -> Device:
    """A device whose prefill passes are attended by `attend`.

    Args:
        provider: its name.
        attend: computes a pass.
        reshape_and_cache: stores keys and values, as vLLM's `reshape_and_cache_flash`.
        num_multiprocessors: of the GPU.
        device: of everything.
    """

    def store(
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
        kv_cache_dtype: str,
        k_scale: torch.Tensor,
        v_scale: torch.Tensor,
    ) -> None:
        key_cache, value_cache = split_kv(kv_cache)
        reshape_and_cache(
            key, value, key_cache, value_cache, slot_mapping, kv_cache_dtype, k_scale, v_scale
        )

    def decode_planner(
        settings: DcaSettings, block_size: int, max_rows: int, num_kv_heads: int
    ) -> DecodePlanner:
        return plan_decode.DecodePlanner(
            settings.geometry,
            settings.original_max_position_embeddings,
            max_rows,
            plan_decode.spare_slots(num_multiprocessors, num_kv_heads),
            device,
        ).plan

    return Device(
        provider,
        PrefillOperations(turn.turn_queries, attend, merge.merge_parts),
        store,
        decode_planner,
        decode.decode_attention,
    )
