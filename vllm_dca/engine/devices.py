"""Which device vLLM runs on in this process, and how DCA runs there."""

import torch
from vllm.logger import init_logger
from vllm.platforms import current_platform

from vllm_dca.cpu.processor import Processor, processor
from vllm_dca.engine.choice import PROVIDERS, choose
from vllm_dca.method.device import Device
from vllm_dca.method.provider import Needs

# vLLM's logger is set up for its own package only.
logger = init_logger("vllm.plugins.dca")


def compute_capability() -> tuple[int, int]:
    """Of this process's GPU, as `Needs` wants it."""
    capability = current_platform.get_device_capability()
    return (0, 0) if capability is None else tuple(capability)


def current_processor() -> Processor | None:
    """What DCA runs on in this process; None on a GPU."""
    return processor() if current_platform.is_cpu() else None


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
    from vllm_dca.cpu import device

    provider, _, reasons = choose("cpu", prefill_provider, needs)
    if reasons:
        logger.warning_once(
            "DCA attends by torch, which takes up to 22 times as long as its own kernel. %s",
            "; ".join(reasons),
        )
    return device.by_kernel() if provider == "compiled" else device.by_torch()


def _interpreted(needs: Needs, prefill_provider: str | None) -> Device:
    provider, attend, _ = choose("interpreter", prefill_provider, needs)
    from vllm_dca.cuda import device

    logger.warning(
        "DCA: prefill_provider %s runs the code for GPUs on this CPU, prefills and decodes, in "
        "Triton's interpreter: for tests, and very slowly.",
        provider,
    )
    return device.interpreted(provider, attend)


def _cuda(needs: Needs, prefill_provider: str | None) -> Device:
    from vllm._custom_ops import reshape_and_cache_flash

    from vllm_dca.cuda import device

    provider, attend, _ = choose("cuda", prefill_provider, needs)
    return device.with_provider(
        provider,
        attend,
        device.storing_by(reshape_and_cache_flash),
        current_platform.num_compute_units(),
        torch.device(current_platform.device_type),
    )
