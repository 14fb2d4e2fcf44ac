"""The command line: what DCA would do with a model, its budgets, and the installation."""

import argparse
import contextlib
import importlib.util
import json
import shlex
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.filesize import pick_unit_and_suffix
from rich.text import Text

from vllm_dca.cli.doctor import findings
from vllm_dca.cli.explain import Explanation, find_out
from vllm_dca.cli.quiet import quiet_vllm
from vllm_dca.method.sparse_cost import Bounds

# vLLM is imported by the commands, after its log is turned down: it takes seconds, and --help
# should not.

# What vLLM makes of --max-model-len auto.
AUTO = -1

app = typer.Typer(
    help="Dual Chunk Attention for vLLM.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
console = Console(highlight=False, soft_wrap=True)
errors = Console(highlight=False, soft_wrap=True, stderr=True)


def _tokens(text: str) -> int:
    from vllm.utils.argparse_utils import human_readable_int_or_auto

    try:
        tokens = human_readable_int_or_auto(text)
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise typer.BadParameter(f"{text!r} is no number of tokens") from error
    if tokens <= 0 and tokens != AUTO:
        raise typer.BadParameter(f"{text!r} is no positive number of tokens")
    return tokens


def _to_write(path: Path) -> Path:
    """What exists typer tries itself."""
    if not path.exists():
        try:
            tempfile.TemporaryFile(dir=path.absolute().parent).close()
        except OSError as error:
            raise typer.BadParameter(f"cannot write {path}: {error.strerror}") from error
    return path


def _object(text: str) -> str:
    try:
        parsed = json.loads(text)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is no JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise typer.BadParameter(f"{text!r} is no JSON object")
    return text


Model = Annotated[str, typer.Argument(help="A checkpoint's directory or name.")]
MaxModelLen = Annotated[
    int | None,
    typer.Option(parser=_tokens, metavar="TOKENS", help="As 32768, 32K or auto."),
]
AdditionalConfig = Annotated[
    str | None, typer.Option(parser=_object, metavar="JSON", help="DCA's options.")
]
Dtype = Annotated[str | None, typer.Option(help="Of the model.")]
TensorParallelSize = Annotated[int | None, typer.Option(min=1, help="Ranks.")]


@app.command()
def explain(
    model: Model,
    max_model_len: MaxModelLen = None,
    block_size: Annotated[
        int | None, typer.Option(min=1, help="Tokens a KV-cache page.")
    ] = None,
    additional_config: AdditionalConfig = None,
    hf_overrides: Annotated[
        str | None, typer.Option(parser=_object, metavar="JSON", help="Over config.json.")
    ] = None,
    dtype: Dtype = None,
    kv_cache_dtype: Annotated[str | None, typer.Option(help="Of the KV cache.")] = None,
    tensor_parallel_size: TensorParallelSize = None,
    language_model_only: Annotated[
        bool, typer.Option("--language-model-only", help="Text alone.")
    ] = False,
    limit_mm_per_prompt: Annotated[
        str | None, typer.Option(parser=_object, metavar="JSON", help="Images and others.")
    ] = None,
    speculative_config: Annotated[
        str | None, typer.Option(parser=_object, metavar="JSON", help="Of a drafter.")
    ] = None,
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
        "language_model_only": language_model_only or None,
        "limit_mm_per_prompt": limit_mm_per_prompt,
        "speculative_config": speculative_config,
    }
    given = {name: value for name, value in options.items() if value is not None}
    if plot is not None and importlib.util.find_spec("matplotlib") is None:
        errors.print("--plot needs matplotlib: pip install matplotlib")
        raise typer.Exit(1)
    with errors.status("Asking vLLM"), quiet_vllm() as warnings, _refusals():
        explanation = find_out(model, given, warnings)
    _print_explanation(explanation, is_auto=max_model_len == AUTO)
    _line("start it", shlex.join(_serve_command(model, given)))
    if plot is not None:
        from vllm_dca.cli.picture import draw

        with _refusals():
            draw(explanation.settings.geometry, explanation.max_model_len, plot)
        _line("picture", str(plot))


@app.command()
def calibrate(
    model: Model,
    text: Annotated[
        Path,
        typer.Option(
            exists=True, dir_okay=False, help="A long text, such as will be asked about."
        ),
    ],
    recall: Annotated[
        float, typer.Option(min=0.1, max=1.0, help="Share of attention that a head keeps.")
    ] = 0.95,
    output: Annotated[
        Path,
        typer.Option(
            dir_okay=False,
            writable=True,
            callback=_to_write,
            help="Where to write the budgets.",
        ),
    ] = Path("sparse_attention_config.json"),
    max_model_len: MaxModelLen = None,
    additional_config: AdditionalConfig = None,
    dtype: Dtype = None,
    tensor_parallel_size: TensorParallelSize = None,
) -> None:
    """Find budgets of sparse prefill for a model, on your own text."""
    from vllm_dca.cli.calibrate import run

    given: dict[str, Any] = {
        "max_model_len": max_model_len,
        "dtype": dtype,
        "tensor_parallel_size": tensor_parallel_size,
    }
    given = {name: value for name, value in given.items() if value is not None}
    additional = json.loads(additional_config or "{}")
    given["additional_config"] = additional
    # An engine that fails, such as for want of memory, says so by a RuntimeError.
    with quiet_vllm() as warnings, _refusals(RuntimeError):
        try:
            run(model, text, recall, output, given, console)
        finally:  # They may be why it failed.
            _print_warnings(warnings)
    # Budgets belong to the chunk sizes that they were found with.
    options = {
        key: value
        for key, value in additional.get("dca", {}).items()
        if key not in ("sparse", "sparse_coverage", "sparse_min_keys")
    }
    options |= {"sparse": "checkpoint", "sparse_budgets": str(output.resolve())}
    used = json.dumps(additional | {"dca": options})
    _line("use it", f"--additional-config {shlex.quote(used)}")


@app.command()
def doctor() -> None:
    """Check the installation, a line for each thing; exit code 1 if anything is wrong."""
    styles = {"ok": "green", "problem": "bold red", "note": "dim"}
    verdicts = set()
    with console.status("Asking vLLM"):
        for verdict, text in findings():
            console.print(Text.assemble((f"{verdict:<9}", styles[verdict]), text))
            verdicts.add(verdict)
    if "problem" in verdicts:
        raise typer.Exit(1)


@contextlib.contextmanager
def _refusals(*others: type[Exception]) -> Iterator[None]:
    """What vLLM, DCA or the file system refuses is a message and exit code 1."""
    from pydantic import ValidationError

    from vllm_dca.engine.shims import IncompatibleVllmError

    refused: tuple[type[Exception], ...] = (
        ValueError,
        NotImplementedError,
        OSError,
        IncompatibleVllmError,
        *others,
    )
    try:
        yield
    except ValidationError as error:
        messages = [reason["msg"].removeprefix("Value error, ") for reason in error.errors()]
        errors.print(Text("; ".join(messages)))
        raise typer.Exit(1) from error
    except refused as error:
        errors.print(Text(str(error)))
        raise typer.Exit(1) from error


def _print_explanation(found: Explanation, is_auto: bool) -> None:
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
    _line("trained window", f"{settings.window} tokens")
    _line(
        "max_model_len",
        f"{found.max_model_len} tokens, {found.max_model_len / settings.window:.1f} times the "
        "window" + ("; by auto: a start lowers it to what its KV cache has room for" * is_auto),
    )
    _line("DCA attends", found.layers.described)
    if found.layers.softmax:
        _line("softmax", f"with {found.layers.softmax}")
    if found.drafter is not None:
        _line("of the drafter", found.drafter.described)
    _line("prefill by", f"{found.provider or 'unknown'}, on this machine ({found.device_type})")
    if settings.sparse is not None and found.sparse is not None:
        _line("sparse prefill", settings.sparse.described)
        _print_bounds(found.sparse, found.max_model_len, settings.sparse.budgets is not None)
    rank = f" on each of {found.ranks} ranks" if found.ranks > 1 else ""
    _line(
        "KV cache",
        f"{_size(found.token_bytes)} a token, {_size(found.request_bytes)} for one request of "
        f"{found.max_model_len} tokens{rank}",
    )
    _print_warnings(found.warnings)


def _print_bounds(sparse: Bounds, length: int, by_budgets: bool) -> None:
    """What is known before a prompt is read."""
    (least, most), (fastest, slowest) = sparse
    if by_budgets:
        keys = f"{least:.1%} to {most:.1%}, by how many of a head's diagonals lie side by side"
        time = f"{fastest:.2f} to {slowest:.2f}"
    else:
        keys = f"{least:.1%} or more: how many is the text's, and vllm_dca:sparse_keys tells it"
        time = f"{fastest:.2f} or more"
    _line("its keys", f"of a prompt of {length} tokens {keys}")
    _line("its time", f"{time} of dense attention's (measured on CPUs), selecting included")


def _print_warnings(warnings: list[str]) -> None:
    for warning in warnings:
        _line("warning", warning.removeprefix("DCA: "), "yellow")


def _line(label: str, text: str, style: str = "bold") -> None:
    console.print(Text.assemble((f"{label:<16}", style), text))


def _size(count: int) -> str:
    """Bytes in units of 1024."""
    unit, suffix = pick_unit_and_suffix(count, ["bytes", "KiB", "MiB", "GiB", "TiB"], 1024)
    return f"{count / unit:.4g} {suffix}"


def _serve_command(model: str, given: dict[str, Any]) -> list[str]:
    command = ["vllm", "serve", model, "--attention-backend", "dca"]
    for name, value in given.items():
        said = "auto" if value == AUTO else str(value)
        command += [f"--{name.replace('_', '-')}", *([] if value is True else [said])]
    return command
