"""The command line: what DCA would do with a model, and whether it is well installed."""

import argparse
import contextlib
import dataclasses
import importlib.util
import itertools
import json
import logging
import shlex
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from rich.console import Console
from rich.filesize import pick_unit_and_suffix
from rich.text import Text

from vllm_dca.config import DcaSettings

# vLLM is imported by the commands, after its log is turned down: it takes seconds, and --help
# should not.

# The authors list models of 7 and 13 billion parameters up to 8 times their window
# (https://github.com/HKUNLP/ChunkLlama).
FARTHEST_LISTED = 8

app = typer.Typer(
    help="Dual Chunk Attention for vLLM.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
console = Console(highlight=False, soft_wrap=True)
errors = Console(highlight=False, soft_wrap=True, stderr=True)


def _tokens(text: str) -> int:
    from vllm.utils.argparse_utils import human_readable_int

    try:
        tokens = human_readable_int(text)
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise typer.BadParameter(f"{text!r} is no number of tokens") from error
    if tokens <= 0:
        raise typer.BadParameter(f"{text!r} is no positive number of tokens")
    return tokens


def _object(text: str) -> str:
    try:
        parsed = json.loads(text)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is no JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise typer.BadParameter(f"{text!r} is no JSON object")
    return text


@app.command()
def explain(
    model: Annotated[str, typer.Argument(help="A checkpoint's directory or name.")],
    max_model_len: Annotated[
        int | None, typer.Option(parser=_tokens, metavar="TOKENS", help="As 32768 or 32K.")
    ] = None,
    block_size: Annotated[
        int | None, typer.Option(min=1, help="Tokens a KV-cache page.")
    ] = None,
    additional_config: Annotated[
        str | None, typer.Option(parser=_object, metavar="JSON", help="DCA's options.")
    ] = None,
    hf_overrides: Annotated[
        str | None, typer.Option(parser=_object, metavar="JSON", help="Over config.json.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the model.")] = None,
    kv_cache_dtype: Annotated[str | None, typer.Option(help="Of the KV cache.")] = None,
    tensor_parallel_size: Annotated[int | None, typer.Option(min=1, help="Ranks.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Write the relative positions to this picture.")
    ] = None,
) -> None:
    """Say what DCA would do with a model, without its weights. Options are `vllm serve`'s."""
    options: dict[str, Any] = {
        "max_model_len": max_model_len,
        "block_size": block_size,
        "additional_config": additional_config,
        "hf_overrides": hf_overrides,
        "dtype": dtype,
        "kv_cache_dtype": kv_cache_dtype,
        "tensor_parallel_size": tensor_parallel_size,
    }
    given = {name: value for name, value in options.items() if value is not None}
    if plot is not None and importlib.util.find_spec("matplotlib") is None:
        errors.print("--plot needs matplotlib: pip install matplotlib")
        raise typer.Exit(1)
    with errors.status("Asking vLLM"), _quiet_vllm() as warnings, _refusals():
        explanation = _explain(model, given, warnings)
    _print_explanation(explanation)
    _line("start it", shlex.join(_serve_command(model, given)))
    if plot is not None:
        from vllm_dca.picture import draw

        with _refusals():
            draw(explanation.settings.geometry, explanation.max_model_len, plot)
        _line("picture", str(plot))


@app.command()
def doctor() -> None:
    """Check the installation, a line for each thing; exit code 1 if anything is wrong."""
    with errors.status("Asking vLLM"), _quiet_vllm():
        findings = [finding for check in CHECKS for finding in check()]
    styles = {"ok": "green", "problem": "bold red", "note": "dim"}
    for verdict, text in findings:
        console.print(Text.assemble((f"{verdict:<9}", styles[verdict]), text))
    if any(finding.verdict == "problem" for finding in findings):
        raise typer.Exit(1)


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """What vLLM, DCA or the file system refuses is a message and exit code 1."""
    from pydantic import ValidationError

    from vllm_dca.compat import IncompatibleVllmError

    try:
        yield
    except ValidationError as error:
        messages = [reason["msg"].removeprefix("Value error, ") for reason in error.errors()]
        errors.print(Text("; ".join(messages)))
        raise typer.Exit(1) from error
    except (ValueError, NotImplementedError, OSError, IncompatibleVllmError) as error:
        errors.print(Text(str(error)))
        raise typer.Exit(1) from error


@contextlib.contextmanager
def _quiet_vllm() -> Iterator[list[str]]:
    """Silence vLLM's log below errors, and collect the warnings of this plugin."""
    logging.disable(logging.WARNING)
    try:
        from vllm.config.logging import LoggingConfig
        from vllm.logger import configure_logging_if_needed

        # Now, as the engine's config would do it later and drop what follows.
        configure_logging_if_needed(LoggingConfig())
    finally:
        logging.disable(logging.NOTSET)
    everything, plugin = logging.getLogger("vllm"), logging.getLogger("vllm.plugins.dca")
    before = [(log, log.level, log.propagate) for log in (everything, plugin)]
    collector = _Collector(logging.WARNING)
    everything.setLevel(logging.ERROR)
    plugin.setLevel(logging.WARNING)
    plugin.propagate = False
    plugin.addHandler(collector)
    try:
        yield collector.messages
    finally:
        plugin.removeHandler(collector)
        for log, level, propagate in before:
            log.setLevel(level)
            log.propagate = propagate


class _Collector(logging.Handler):
    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What `explain` found out.

    Attributes:
        settings: DCA's.
        window: tokens that the model takes without DCA.
        max_model_len: tokens that a request may have.
        block_size: tokens in a page of the KV cache.
        device_type: of this machine, which chose the block size and the provider.
        dca_layers: names of the layers that DCA attends.
        other_layers: names of those that keep another attention.
        provider: of the prefill's attention; None where that could not be asked.
        token_bytes: KV cache of one more token in DCA's layers, on each rank.
        request_bytes: KV cache of one request of max_model_len tokens, on each rank.
        ranks: of tensor parallelism.
        warnings: for people to read.
    """

    settings: DcaSettings
    window: int
    max_model_len: int
    block_size: int
    device_type: str
    dca_layers: list[str]
    other_layers: list[str]
    provider: str | None
    token_bytes: int
    request_bytes: int
    ranks: int
    warnings: list[str]


def _explain(model: str, given: dict[str, Any], warnings: list[str]) -> Explanation:
    """Configure vLLM as a start would, and build the model without its weights.

    Args:
        model: a checkpoint's directory or name.
        given: options of `vllm serve`, JSON as text.
        warnings: where the plugin's own arrive.

    Raises:
        ValueError, NotImplementedError, OSError, IncompatibleVllmError: as a start would.
    """
    from vllm_dca import compat

    compat.apply()
    from vllm.config import get_layers_from_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
    from vllm.platforms import current_platform
    from vllm.v1.core.kv_cache_utils import max_memory_usage_bytes
    from vllm.v1.kv_cache_interface import AttentionSpec

    from vllm_dca.backend import DcaBackend
    from vllm_dca.startup import settings_of

    parsed = {
        name: json.loads(value) if name in ("additional_config", "hf_overrides") else value
        for name, value in given.items()
    }
    args = EngineArgs(model, attention_backend="dca", skip_tokenizer_init=True, **parsed)
    vllm_config = args.create_engine_config()
    unchecked = _build(vllm_config)

    layers = get_layers_from_vllm_config(vllm_config, AttentionLayerBase)
    dca = [name for name, layer in layers.items() if layer.get_attn_backend() is DcaBackend]
    ranks = vllm_config.parallel_config.tensor_parallel_size
    specs = {name: layer.get_kv_cache_spec(vllm_config) for name, layer in layers.items()}
    # The model was built as for one rank; vLLM gives each at least one KV head.
    for name, spec in specs.items():
        if isinstance(spec, AttentionSpec):
            heads = max(spec.num_kv_heads // ranks, 1)
            specs[name] = dataclasses.replace(spec, num_kv_heads=heads)
    devices = [layers[name].impl.device for name in dca]
    model_config = vllm_config.model_config
    settings, window = settings_of(vllm_config), model_config.get_and_verify_max_len(None)
    return Explanation(
        settings=settings,
        window=window,
        max_model_len=model_config.max_model_len,
        block_size=vllm_config.cache_config.block_size,
        device_type=current_platform.device_type,
        dca_layers=dca,
        other_layers=[name for name in layers if name not in dca],
        provider=devices[0].provider if devices and devices[0] is not None else None,
        token_bytes=sum(specs[name].page_size_bytes // specs[name].block_size for name in dca),
        request_bytes=max_memory_usage_bytes(vllm_config, specs.values()),
        ranks=ranks,
        warnings=[
            *warnings,
            *unchecked,
            *_length_warnings(settings, window, model_config.max_model_len),
        ],
    )


def _build(vllm_config: Any) -> list[str]:
    """Build the model on the meta device and install DCA in it, as loading would.

    Returns:
        A warning, if the installation cannot be tried without the weights.

    Raises:
        ValueError, NotImplementedError: a layer cannot be served.
    """
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.distributed import (
        cleanup_dist_env_and_memory,
        ensure_model_parallel_initialized,
        init_distributed_environment,
    )
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    from vllm_dca.backend import DcaBackend

    dtype = vllm_config.model_config.dtype
    with (
        tempfile.TemporaryDirectory() as directory,
        set_current_vllm_config(vllm_config),
    ):
        try:
            init_distributed_environment(1, 0, f"file://{directory}/store", 0, "gloo")
            ensure_model_parallel_initialized(1, 1)
            with torch.device("meta"), set_default_torch_dtype(dtype):
                model = initialize_model(vllm_config)
                DcaBackend.prepare_model(model, vllm_config)
        except NotImplementedError as error:
            if "meta tensor" not in str(error):
                raise
            return [f"Whether DCA can serve each layer shows only at a start ({error})"]
        finally:
            cleanup_dist_env_and_memory()
    return []


def _length_warnings(settings: DcaSettings, window: int, max_model_len: int) -> list[str]:
    chunk_len, times = settings.geometry.chunk_len, max_model_len / window
    if max_model_len <= chunk_len:
        return [
            f"{max_model_len} tokens are within one chunk, where DCA is ordinary attention; "
            "--max-model-len extends."
        ]
    if max_model_len <= window:
        return [
            f"{max_model_len} tokens are within the trained window, where the model does "
            "without DCA; --max-model-len extends."
        ]
    if times > FARTHEST_LISTED:
        return [
            f"{times:.1f} times the window: DCA's authors list 7B and 13B models up to "
            f"{FARTHEST_LISTED} times, only their 70B farther. Measure before you rely on it."
        ]
    return []


def _print_explanation(found: Explanation) -> None:
    settings = found.settings
    temperature = settings.original_max_position_embeddings
    _line("chunk_size", f"{settings.chunk_size} tokens, {settings.source}")
    _line("local_size", f"{settings.local_size} tokens")
    _line(
        "chunk_len",
        f"{settings.geometry.chunk_len} tokens, in blocks of {found.block_size}",
    )
    _line(
        "temperature",
        "none" if temperature is None else f"grows from {temperature} tokens on",
    )
    _line("trained window", f"{found.window} tokens")
    _line(
        "max_model_len",
        f"{found.max_model_len} tokens, {found.max_model_len / found.window:.1f} times the "
        "window",
    )
    total = len(found.dca_layers) + len(found.other_layers)
    others = _layers(found.other_layers)
    _line(
        "DCA attends",
        f"{len(found.dca_layers)} of {total} layers: {_layers(found.dca_layers)}"
        + (f"; {others} keep another attention" if others else ""),
    )
    _line("prefill by", f"{found.provider or 'unknown'}, on this machine ({found.device_type})")
    rank = f" on each of {found.ranks} ranks" if found.ranks > 1 else ""
    _line(
        "KV cache",
        f"{_size(found.token_bytes)} a token, {_size(found.request_bytes)} for one request of "
        f"{found.max_model_len} tokens{rank}",
    )
    for warning in found.warnings:
        _line("warning", warning.removeprefix("DCA: "), "yellow")


def _line(label: str, text: str, style: str = "bold") -> None:
    console.print(Text.assemble((f"{label:<16}", style), text))


def _layers(names: list[str]) -> str:
    """Numbers of layers, runs as first-last: "0-4, 6"."""
    from vllm.model_executor.models.utils import extract_layer_index

    numbers = sorted(extract_layer_index(name) for name in names)
    runs = []
    for _, group in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        run = [number for _, number in group]
        runs.append(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}")
    return ", ".join(runs)


def _size(count: int) -> str:
    """Bytes in units of 1024."""
    unit, suffix = pick_unit_and_suffix(count, ["bytes", "KiB", "MiB", "GiB", "TiB"], 1024)
    return f"{count / unit:.4g} {suffix}"


def _serve_command(model: str, given: dict[str, Any]) -> list[str]:
    command = ["vllm", "serve", model, "--attention-backend", "dca"]
    for name, value in given.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    return command


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

    from vllm_dca.compat import TESTED_VLLM

    tested = ", ".join(TESTED_VLLM)
    if ".".join(vllm.__version__.split(".")[:2]) in TESTED_VLLM:
        yield Finding("ok", f"vLLM {vllm.__version__} (tested: {tested})")
    else:
        yield Finding(
            "problem",
            f"vLLM {vllm.__version__} is not tested: install {tested}, or a vllm-dca that "
            "supports this vLLM",
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


def _check_platform() -> Iterator[Finding]:
    from vllm.platforms import current_platform

    from vllm_dca.backend import DcaBackend

    name = current_platform.device_type
    if not (current_platform.is_cpu() or current_platform.is_cuda()):
        yield Finding("problem", f"platform {name or 'unknown'}: DCA runs on cpu and cuda")
        return
    capability = current_platform.get_device_capability()
    of = "" if capability is None else f", compute capability {capability.as_version_str()}"
    if DcaBackend.supports_compute_capability(capability):
        yield Finding("ok", f"platform {name}{of}")
    else:
        yield Finding("problem", f"platform {name}{of}: DCA needs a GPU of 8.0 or higher")


def _check_providers() -> Iterator[Finding]:
    import torch
    from vllm.platforms import current_platform

    from vllm_dca.providers import Needs, UnusableProviderError
    from vllm_dca.providers.choice import PROVIDERS

    capability = current_platform.get_device_capability()
    needs = Needs(
        head_size=128,
        dtype=torch.bfloat16,
        cache_dtype=torch.bfloat16,
        block_size=16,
        capability=(0, 0) if capability is None else tuple(capability),
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
    from vllm_dca import compat

    try:
        in_force = compat.apply()
    except compat.IncompatibleVllmError as error:
        yield Finding("problem", f"DCA cannot be made available: {error}")
        return
    patched = [shim.__name__ for shim in compat.SHIMS if shim.__name__ not in in_force]
    yield Finding("ok", f"shims in force: {', '.join(in_force) or 'none'}")
    yield Finding("ok", f"patches in vLLM instead of shims: {', '.join(patched) or 'none'}")


def _check_selection() -> Iterator[Finding]:
    import torch
    from vllm.config import AttentionConfig, VllmConfig, set_current_vllm_config
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    from vllm.v1.attention.selector import get_attn_backend

    from vllm_dca.backend import DcaBackend
    from vllm_dca.compat import NAME

    if NAME not in AttentionBackendEnum.__members__:
        return  # why, is said of the shims
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
    _check_platform,
    _check_providers,
    _check_shims,
    _check_selection,
)
