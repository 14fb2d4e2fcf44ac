"""Who computes the prefill on a device: the user's choice, else the first that can serve."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

from vllm_dca.cuda import flash_attn, xformers_pass
from vllm_dca.method.device import Device, Prefill
from vllm_dca.method.provider import AttentionProvider, Needs, UnusableProviderError

# What attends a pass, all of a prefill at once, or everything, as on the CPU.
Provider = AttentionProvider | Prefill | Device


def _compiled(needs: Needs) -> Device:
    from vllm_dca.cpu import build, device

    try:
        return device.by_kernel()
    except build.BuildError as error:
        raise UnusableProviderError(f"it cannot be compiled here ({error})") from error


def _torch(needs: Needs) -> Device:
    from vllm_dca.cpu import device

    return device.by_torch()


def _vllm_flash_attn(needs: Needs) -> AttentionProvider:
    try:
        from vllm.platforms import current_platform
        from vllm.v1.attention.backends.fa_utils import get_flash_attn_version
        from vllm.vllm_flash_attn import flash_attn_varlen_func
    except ImportError as error:
        raise UnusableProviderError(f"vLLM was built without it ({error})") from error
    fa_version = get_flash_attn_version(
        head_size=needs.head_size,
        requires_softcap=needs.has_soft_cap,
        kv_cache_block_size=needs.block_size,
    )
    if fa_version is None:
        raise UnusableProviderError(f"vLLM has none for compute capability {needs.capability}")
    return flash_attn.bundled_with_vllm(
        flash_attn_varlen_func, fa_version, needs, current_platform.num_compute_units()
    )


def _triton(needs: Needs) -> Prefill:
    _check_triton(needs)
    from vllm_dca.cuda.device import WALK

    return WALK


def _triton_passes(needs: Needs) -> AttentionProvider:
    _check_triton(needs)
    from vllm_dca.cuda.paged_pass import attention

    return attention


def _check_triton(needs: Needs) -> None:
    if needs.cache_dtype == torch.float8_e4m3fn and needs.capability < (8, 9):
        raise UnusableProviderError(
            f"it needs compute capability 8.9 for a {needs.cache_dtype} cache, and this is "
            f"{needs.capability}; --kv-cache-dtype fp8_e5m2 works"
        )


def _interpreted(needs: Needs) -> Prefill:
    _check_interpreter()
    return _triton(needs)


def _interpreted_passes(needs: Needs) -> AttentionProvider:
    _check_interpreter()
    return _triton_passes(needs)


def _check_interpreter() -> None:
    try:
        from vllm_dca.cuda.device import interprets
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise UnusableProviderError(f"Triton is not installed ({error})") from error
    if not interprets():
        raise UnusableProviderError(
            "without a GPU it runs in Triton's interpreter only, which is for tests: set "
            "TRITON_INTERPRET=1 if that is meant"
        )


# In order of preference. xformers copies a pass's keys, so it goes after what reads them in
# their pages; it multiplies by flash-attention, so it goes before Triton's plain kernels.
# "triton_passes" serves what "triton" does, so after it it runs only where it is asked for.
# "interpreter" is CUDA's path on a CPU.
PROVIDERS: dict[str, dict[str, Callable[[Needs], Provider]]] = {
    "cpu": {"compiled": _compiled, "torch": _torch},
    "cuda": {
        "vllm_flash_attn": _vllm_flash_attn,
        "flash_attn": flash_attn.package,
        "xformers": xformers_pass.provider,
        "triton": _triton,
        "triton_passes": _triton_passes,
    },
    "interpreter": {"triton": _interpreted, "triton_passes": _interpreted_passes},
}


def in_order(device_type: str, needs: Needs) -> list[str]:
    """Names of a device's providers, the preferred first.

    On compute capability 10, with heads of up to 128 entries, one program fewer fits on a
    multiprocessor if all of DCA is one launch (docs/gpu-kernels.md): there the passes go first.
    """
    names = list(PROVIDERS[device_type])
    if device_type == "cuda" and needs.capability[0] == 10:
        names.remove("triton_passes")
        names.insert(names.index("triton"), "triton_passes")
    return names


def serving_all(device_type: str, needs: Iterable[Needs]) -> list[str]:
    """A device's providers that serve all of these needs, the preferred first."""

    def serves(name: str, each: Needs) -> bool:
        try:
            PROVIDERS[device_type][name](each)
        except UnusableProviderError:
            return False
        return True

    wanted = [*needs]
    names = in_order(device_type, wanted[0])
    return [name for name in names if all(serves(name, each) for each in wanted)]


class Choice(NamedTuple):
    """A provider, its name, and why those that are preferred to it cannot serve."""

    name: str
    provider: Provider
    reasons: list[str]


def choose(device_type: str, asked: str | None, needs: Needs) -> Choice:
    """The provider that was asked for, or the first that can serve.

    Args:
        device_type: "cpu", "cuda" or "interpreter".
        asked: the user's prefill_provider, or None to take the first that can serve.
        needs: what it has to serve.

    Raises:
        ValueError: no such provider, or none can serve; says why each cannot.
    """
    known = PROVIDERS[device_type]
    if asked is not None and asked not in known:
        raise ValueError(
            f"DCA's prefill_provider {asked!r} is not known on this device; choose from "
            f"{', '.join(known)}, or leave it out."
        )
    reasons: list[str] = []
    for name in in_order(device_type, needs) if asked is None else [asked]:
        try:
            return Choice(name, known[name](needs), reasons)
        except UnusableProviderError as error:
            reasons.append(f"{name}: {error}")
    raise ValueError(f"DCA has no attention provider for prefill here. {'; '.join(reasons)}.")
