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
    except argparse.ArgumentTypeError as error:
        raise ValueError(str(error)) from error
    if tokens <= 0:
        raise ValueError(text)
    return tokens


def _object(text: str) -> str:
    if not isinstance(json.loads(text), dict):
        raise ValueError(text)
    return text


@app.command()
def explain(
    model: Annotated[str, typer.Argument(help="A checkpoint's directory or name.")],
    max_model_len: Annotated[
        int | None, typer.Option(parser=_tokens, metavar="TOKENS", help="As 32768 or 32K.")
    ] = None,
    block_size: Annotated[int | None, typer.Option(min=1, help="Tokens a KV-cache page.")] = None,
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
    with _refusals(), errors.status("Asking vLLM"), _quiet_vllm() as warnings:
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
    """Silence vLLM's log below errors, and give the warnings of this plugin."""
    everything = logging.getLogger("vllm")
    everything.setLevel(logging.ERROR)
    import vllm.logger  # noqa: F401, sets its loggers up anew

    plugin = logging.getLogger("vllm.plugins.dca")
    kept = [(log, log.level, log.propagate) for log in (everything, plugin)]
    warnings: list[str] = []
    collector = logging.Handler(logging.WARNING)
    collector.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    everything.setLevel(logging.ERROR)
    plugin.setLevel(logging.WARNING)
    plugin.propagate = False
    plugin.addHandler(collector)
    try:
        yield warnings
    finally:
        plugin.removeHandler(collector)
        for log, level, propagate in kept:
            log.setLevel(level)
            log.propagate = propagate
