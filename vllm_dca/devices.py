"""What differs from device to device: storing keys, the prefill's operations, and decode."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionLayer

from vllm_dca import attention_compiled, decode_cpu
from vllm_dca.config import DcaSettings
from vllm_dca.kv_cache import split_kv, write_kv
from vllm_dca.merge import merge_parts
from vllm_dca.prefill import PrefillOperations
from vllm_dca.providers import Needs
from vllm_dca.providers.choice import choose
from vllm_dca.rotary import turn_queries

# vLLM's logger is set up for its own package only.
logger = init_logger("vllm.plugins.dca")

# From query_start_loc, seq_lens, block_table and the number of rows to a plan for `decode`.
DecodePlanner = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], Any]


class Device(NamedTuple):
    """How a device runs DCA.

    Attributes:
        provider: name of the prefill's attention provider, for people to read.
        prefill: the prefill's operations; None if `decode` takes any number of new tokens, so
            that prefills are planned and run as decodes are.
        write_kv: stores new keys and values, given the layer, key, value, KV cache, slot
            mapping and KV-cache dtype of vLLM's `AttentionImpl.do_kv_cache_update`.
        decode_planner: makes a planner from the settings, the block size, the most rows that
            a step has, and the number of KV heads.
        decode: attends from a few new tokens a request, or from any where `prefill` is None;
            see `vllm_dca.decode_cpu`.
    """

    provider: str
    prefill: PrefillOperations | None
    write_kv: Callable[..., None]
    decode_planner: Callable[[DcaSettings, int, int, int], DecodePlanner]
    decode: Callable[..., None]


def compute_capability() -> tuple[int, int]:
    """Of this process's GPU, as `Needs` wants it."""
    capability = current_platform.get_device_capability()
    return (0, 0) if capability is None else tuple(capability)


def current_device(needs: Needs, prefill_provider: str | None) -> Device:
    """The device that vLLM runs on in this process.

    Raises:
        ValueError: it has no provider for the needs, or not the one that was asked for.
    """
    make = _cpu if current_platform.is_cpu() else _cuda
    return make(needs, prefill_provider)


def _cpu(needs: Needs, prefill_provider: str | None) -> Device:
    provider, attend, reasons = choose("cpu", prefill_provider, needs)
    compiled = provider == "compiled"
    if reasons:
        logger.warning_once(
            "DCA attends by torch, which takes two to nine times as long as its own kernel. %s",
            "; ".join(reasons),
        )
    store_tokens = attention_compiled.write_kv if compiled else write_kv
    plan_of = attention_compiled.CompiledPlan if compiled else decode_cpu.DecodePlan

    def store(
        layer: AttentionLayer,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
        kv_cache_dtype: str,
    ) -> None:
        store_tokens(key, value, kv_cache, slot_mapping)

    def decode_planner(
        settings: DcaSettings, block_size: int, max_rows: int, num_kv_heads: int
    ) -> DecodePlanner:
        geometry, length = settings.geometry, settings.original_max_position_embeddings

        def plan(
            query_start_loc: torch.Tensor,
            seq_lens: torch.Tensor,
            block_table: torch.Tensor,
            num_rows: int,
        ) -> Any:
            return plan_of(query_start_loc, seq_lens, block_table, block_size, geometry, length)

        return plan

    return Device(
        provider,
        None if compiled else PrefillOperations(turn_queries, attend, merge_parts),
        store,
        decode_planner,
        attend if compiled else decode_cpu.decode_attention,
    )


def _cuda(needs: Needs, prefill_provider: str | None) -> Device:
    from vllm._custom_ops import reshape_and_cache_flash

    from vllm_dca.kernels import decode, merge, plan_decode, turn

    provider, attend, _ = choose("cuda", prefill_provider, needs)
    device = torch.device(current_platform.device_type)

    def store(
        layer: AttentionLayer,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
        kv_cache_dtype: str,
    ) -> None:
        reshape_and_cache_flash(
            key,
            value,
            *split_kv(kv_cache),
            slot_mapping,
            kv_cache_dtype,
            layer._k_scale,
            layer._v_scale,
        )

    def decode_planner(
        settings: DcaSettings, block_size: int, max_rows: int, num_kv_heads: int
    ) -> DecodePlanner:
        return plan_decode.DecodePlanner(
            settings.geometry,
            settings.original_max_position_embeddings,
            max_rows,
            plan_decode.spare_slots(current_platform.num_compute_units(), num_kv_heads),
            device,
        ).plan

    return Device(
        provider,
        PrefillOperations(turn.turn_queries, attend, merge.merge_parts),
        store,
        decode_planner,
        decode.decode_attention,
    )
