"""Which device vLLM runs on in this process, and how DCA runs there."""

import json
from collections.abc import Mapping
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.platforms import current_platform

from vllm_dca.cpu.processor import Processor, processor
from vllm_dca.engine.block_size import block_size_of
from vllm_dca.engine.log import logger
from vllm_dca.engine.providers import PROVIDERS, choose, serving_all
from vllm_dca.engine.settings import OPTIONS
from vllm_dca.engine.support import cache_dtype_of
from vllm_dca.method.config import PROVIDER_KEY
from vllm_dca.method.device import Device
from vllm_dca.method.provider import Needs


def compute_capability() -> tuple[int, int]:
    """Major and minor number of this process's GPU; (0, 0) without one."""
    capability = current_platform.get_device_capability()
    return (0, 0) if capability is None else tuple(capability)


def current_processor() -> Processor | None:
    """What DCA runs on in this process; None on a GPU."""
    return processor() if current_platform.is_cpu() else None


def needs_of(layer: Attention, vllm_config: VllmConfig) -> Needs:
    """What a provider has to serve in a layer."""
    dtype = vllm_config.model_config.dtype
    return Needs(
        head_size=layer.head_size,
        dtype=dtype,
        cache_dtype=cache_dtype_of(layer.kv_cache_dtype, dtype),
        block_size=block_size_of(vllm_config),
        capability=compute_capability(),
        has_soft_cap=layer.impl.soft_cap is not None,
    )


def check_one_plan(layers: Mapping[str, Attention], vllm_config: VllmConfig) -> None:
    """All layers of a KV cache group get the same plan of a step's prefills.

    Raises:
        ValueError: their providers want different ones.
    """
    of_plans: dict[Any, str] = {}
    for name, layer in layers.items():
        device = layer.impl.prepared.device
        plan = None if device.prefill is None else device.prefill.plan
        of_plans.setdefault(plan, f"{name} by {device.provider}")
    if len(of_plans) == 1:
        return
    device_type = "cpu" if current_platform.is_cpu() else "cuda"
    needs = (needs_of(layer, vllm_config) for layer in layers.values())
    common = serving_all(device_type, needs)
    advice = "Use another attention backend."
    if common:
        given = json.dumps({OPTIONS: {PROVIDER_KEY: common[0]}})
        advice = f"Ask for one that serves all: --additional-config '{given}'."
    raise ValueError(
        "DCA plans a step once for all layers of a KV cache group, and these would want "
        f"different plans: {', '.join(of_plans.values())}. {advice}"
    )


def current_device(needs: Needs, prefill_provider: str | None) -> Device:
    """The device that vLLM runs on in this process.

    Raises:
        ValueError: it has no provider for the needs, or not the one that was asked for.
    """
    if not current_platform.is_cpu():
        return _cuda(needs, prefill_provider)
    if prefill_provider in PROVIDERS["interpreter"]:
        return _interpreted(needs, prefill_provider)
    return _cpu(needs, prefill_provider)


def _cpu(needs: Needs, prefill_provider: str | None) -> Device:
    _, device, reasons = choose("cpu", prefill_provider, needs)
    assert isinstance(device, Device)
    if reasons:
        logger.warning_once(
            "DCA attends by torch, which takes several times as long as its own kernel. %s",
            "; ".join(reasons),
        )
    return device


def _interpreted(needs: Needs, prefill_provider: str | None) -> Device:
    name, provider, _ = choose("interpreter", prefill_provider, needs)
    assert not isinstance(provider, Device)
    from vllm_dca.cuda import device

    logger.warning(
        "DCA: prefill_provider %s runs the code for GPUs on this CPU, prefills and decodes, in "
        "Triton's interpreter: for tests, and very slowly.",
        name,
    )
    return device.interpreted(name, provider)


def _cuda(needs: Needs, prefill_provider: str | None) -> Device:
    from vllm._custom_ops import reshape_and_cache_flash

    from vllm_dca.cuda import device

    name, provider, reasons = choose("cuda", prefill_provider, needs)
    assert not isinstance(provider, Device)
    if reasons:
        logger.info_once("DCA prefills by %s. Others cannot: %s", name, "; ".join(reasons))
    return device.with_provider(
        name,
        provider,
        device.storing_by(reshape_and_cache_flash),
        current_platform.num_compute_units(),
        torch.device(current_platform.device_type),
    )
