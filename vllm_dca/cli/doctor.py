"""Whether DCA is well installed: a finding for each thing that must be right."""

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

from vllm_dca.cli.quiet import quiet_vllm


class Finding(NamedTuple):
    """What a check of `doctor` found.

    Attributes:
        verdict: "ok", "problem", or "note" for what is neither.
        text: what was found and, of a problem, what to do.
    """

    verdict: str
    text: str


def _check_vllm() -> Iterator[Finding]:
    import vllm

    from vllm_dca.engine.shims import TESTED_VLLM, how_tested

    if how := how_tested():
        yield Finding("ok", f"vLLM {vllm.__version__}, tested {how}")
    else:
        yield Finding(
            "problem",
            f"vLLM {vllm.__version__} is not tested: install {', '.join(TESTED_VLLM)}, or a "
            "vllm-dca that supports this vLLM",
        )


def _check_entry_point() -> Iterator[Finding]:
    from importlib.metadata import entry_points

    import vllm.envs
    from vllm.plugins import DEFAULT_PLUGINS_GROUP, load_plugins_by_group

    from vllm_dca.plugin import register

    installed = entry_points(group=DEFAULT_PLUGINS_GROUP, name="dca")
    if not installed:
        yield Finding(
            "problem",
            f"the entry point dca in {DEFAULT_PLUGINS_GROUP} is not installed: pip install "
            "vllm-dca into this environment (running from its folder is not enough)",
        )
    elif load_plugins_by_group(DEFAULT_PLUGINS_GROUP).get("dca") is register:
        yield Finding("ok", f"vLLM loads the plugin dca ({DEFAULT_PLUGINS_GROUP})")
    elif "dca" not in (allowed := vllm.envs.VLLM_PLUGINS or ["dca"]):
        yield Finding(
            "problem",
            f"VLLM_PLUGINS={','.join(allowed)} keeps the plugin dca out: add dca to "
            "it, or unset it",
        )
    else:
        values = ", ".join(point.value for point in installed)
        yield Finding(
            "problem",
            f"the plugin dca ({values}) is not this one, or does not load: reinstall vllm-dca",
        )


def _check_metrics() -> Iterator[Finding]:
    from importlib.metadata import entry_points

    from vllm.plugins import STAT_LOGGER_PLUGINS_GROUP

    from vllm_dca.engine.metrics import DcaStatLogger

    wanted = f"{DcaStatLogger.__module__}:{DcaStatLogger.__qualname__}"
    found = [point.value for point in entry_points(group=STAT_LOGGER_PLUGINS_GROUP, name="dca")]
    if wanted in found:
        yield Finding("ok", f"vLLM loads DCA's metrics ({STAT_LOGGER_PLUGINS_GROUP})")
    else:
        yield Finding(
            "problem",
            f"/metrics will have none of DCA's: the entry point dca in "
            f"{STAT_LOGGER_PLUGINS_GROUP} is {', '.join(found) or 'not installed'}, and this "
            f"version's is {wanted}: install vllm-dca again",
        )


def _check_platform() -> Iterator[Finding]:
    from vllm.platforms import current_platform

    from vllm_dca.engine.backend import DcaBackend

    name = current_platform.device_type
    if not name:
        yield Finding(
            "problem",
            "platform unknown: vLLM's build for CUDA sees no GPU, or its driver does not "
            "answer (nvidia-smi says which); for a CPU vLLM has another build",
        )
        return
    if not (current_platform.is_cpu() or current_platform.is_cuda()):
        yield Finding("problem", f"platform {name}: DCA runs on cpu and cuda")
        return
    capability = current_platform.get_device_capability()
    of = "" if capability is None else f", compute capability {capability.as_version_str()}"
    if DcaBackend.supports_compute_capability(capability):
        yield Finding("ok", f"platform {name}{of}")
    else:
        yield Finding(
            "problem",
            f"platform {name}{of}: DCA needs a GPU of compute capability 8.0 or higher",
        )


def _check_processor() -> Iterator[Finding]:
    import torch
    from vllm.platforms import current_platform

    from vllm_dca.engine.devices import current_processor

    processor = current_processor()
    if processor is None:
        return
    if processor.half is None:
        yield Finding(
            "ok",
            f"processor with {processor.instructions}, no instruction that multiplies "
            "bfloat16: serve with --dtype float32, several times as fast here",
        )
    else:
        yield Finding(
            "ok",
            f"processor with {processor.instructions}, which multiplies bfloat16 by "
            f"{processor.half}: serve with --dtype bfloat16",
        )
    operator = "cpu_gemm_wna16"
    current_platform.import_kernels()
    if not hasattr(torch.ops._C, operator):
        yield Finding(
            "note",
            f"4-bit weights (AWQ, GPTQ and the like): no, because vLLM's library for "
            f"{processor.instructions} has no operator {operator}",
        )


def _check_providers() -> Iterator[Finding]:
    import torch
    from vllm.platforms import current_platform

    from vllm_dca.engine.devices import compute_capability
    from vllm_dca.engine.providers import PROVIDERS
    from vllm_dca.method.provider import Needs, UnusableProviderError

    needs = Needs(
        head_size=128,
        dtype=torch.bfloat16,
        cache_dtype=torch.bfloat16,
        block_size=16,
        capability=compute_capability(),
    )
    device_type = current_platform.device_type
    what = "(heads of 128, bfloat16, blocks of 16)"
    serving = 0
    for name, load in PROVIDERS.get(device_type, {}).items():
        try:
            load(needs)
        except (UnusableProviderError, ImportError) as error:
            yield Finding("note", f"prefill by {name}: no, because {error}")
        else:
            serving += 1
            yield Finding("ok", f"prefill by {name} {what}")
    if not serving:
        yield Finding(
            "problem", f"nothing can compute the prefill on {device_type or 'this platform'}"
        )


def _check_shims() -> Iterator[Finding]:
    from vllm_dca.engine import shims

    try:
        in_force = shims.apply()
    except shims.IncompatibleVllmError as error:
        yield Finding("problem", f"DCA cannot be made available: {error}")
        # What stands in the way of supporting this vLLM, and what does not.
        for shim in shims.SHIMS:
            moved = shim.moved() if shim.is_needed() else None
            yield Finding("note", moved or f"the shim {shim.name} fits this vLLM")
        return
    patched = [shim.name for shim in shims.SHIMS if shim.name not in in_force]
    yield Finding("ok", f"shims in force: {', '.join(in_force) or 'none'}")
    yield Finding("ok", f"patches in vLLM instead of shims: {', '.join(patched) or 'none'}")


def _check_selection() -> Iterator[Finding]:
    import torch
    from vllm.config import AttentionConfig, VllmConfig, set_current_vllm_config
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    from vllm.v1.attention.selector import get_attn_backend

    from vllm_dca.engine.backend import DcaBackend
    from vllm_dca.engine.shims import NAME

    if NAME not in AttentionBackendEnum.__members__ or not current_platform.device_type:
        return  # why, is said of the shims, or of the platform
    try:
        chosen = VllmConfig(
            attention_config=AttentionConfig(backend=AttentionBackendEnum[NAME])
        )
        with set_current_vllm_config(chosen):
            backend = get_attn_backend(128, torch.bfloat16, "auto")
    except ValueError as error:
        yield Finding("problem", f"--attention-backend dca is refused by vLLM: {error}")
        return
    if backend is DcaBackend:
        yield Finding("ok", f"--attention-backend dca selects {_path(backend)}")
    else:
        yield Finding(
            "problem",
            f"--attention-backend dca selects {_path(backend)}, not {_path(DcaBackend)}: "
            "uninstall what else registers DCA",
        )


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    _check_vllm,
    _check_entry_point,
    _check_metrics,
    _check_platform,
    _check_processor,
    _check_providers,
    _check_shims,
    _check_selection,
)


def findings() -> Iterator[Finding]:
    """What the checks find, as they find it; one that fails is a problem, not the end."""
    with contextlib.ExitStack() as quiet:
        try:
            quiet.enter_context(quiet_vllm())
        except Exception as error:
            yield Finding("problem", f"vLLM cannot be imported: {error}")
            return
        for check in CHECKS:
            try:
                yield from check()
            except Exception as error:
                what = check.__name__.removeprefix("_check_").replace("_", " ")
                yield Finding("problem", f"{what}: {type(error).__name__}: {error}")
