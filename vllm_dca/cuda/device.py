"""A GPU as a device of DCA: Triton kernels around whichever provider attends the passes."""

import functools
from collections.abc import Callable

import torch
from triton import knobs

from vllm_dca.cuda import (
    decode,
    merge,
    plan_decode,
    plan_prefill,
    prefill,
    sparse_prefill,
    turn,
)
from vllm_dca.method.config import DcaSettings
from vllm_dca.method.device import Device, PlanDecode, Prefill, PrefillOperations, WriteKV
from vllm_dca.method.kv_cache import split_kv, without_scales, write_kv
from vllm_dca.method.prefill import by_passes
from vllm_dca.method.provider import AttentionProvider

# All of a prefill in one launch.
WALK = Prefill(plan_prefill.plan_walk, prefill.walk_attention)


def prefill_by(provider: AttentionProvider | Prefill) -> Prefill:
    """Three passes by a provider of one, unless it takes all of DCA at once."""
    if isinstance(provider, Prefill):
        return provider
    return by_passes(PrefillOperations(turn.turn_queries, provider, merge.merge_parts))


def with_provider(
    provider: str,
    attend: AttentionProvider | Prefill,
    write_kv: WriteKV,
    num_multiprocessors: int,
    device: torch.device,
) -> Device:
    """A device whose prefills are attended by `attend`.

    Args:
        provider: its name.
        attend: computes a pass, or all of a prefill.
        write_kv: stores keys and values; `storing_by` makes one.
        num_multiprocessors: of the GPU.
        device: of everything.
    """

    def decode_planner(
        settings: DcaSettings, block_size: int, max_rows: int, group: int
    ) -> PlanDecode:
        return plan_decode.DecodePlanner(
            settings.geometry,
            settings.original_max_position_embeddings,
            max_rows,
            group,
            plan_decode.programs(num_multiprocessors),
            device,
        ).plan

    return Device(
        provider=provider,
        prefill=prefill_by(attend),
        write_kv=write_kv,
        decode_planner=decode_planner,
        decode=decode.decode_attention,
        decode_rows=plan_decode.rows_a_pack,
        sparse=functools.partial(sparse_prefill.with_buffers, device=device),
    )


def storing_by(reshape_and_cache: Callable[..., None]) -> WriteKV:
    """By vLLM's `reshape_and_cache_flash`."""

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

    return store


def interprets() -> bool:
    """Whether Triton runs kernels by its interpreter in this process, which needs no GPU."""
    return bool(knobs.runtime.interpret)


def interpreted(provider: str, attend: AttentionProvider | Prefill) -> Device:
    """A GPU of one multiprocessor, played by the CPU.

    Args:
        provider: its name.
        attend: computes a pass, or all of a prefill, without a GPU.
    """
    store = without_scales(write_kv)
    return with_provider(provider, attend, store, 1, torch.device("cpu"))
