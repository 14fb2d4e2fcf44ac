"""The command line: what DCA would do with a model, its budgets, and the installation."""

import contextlib
import importlib.util
import json
import shlex
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.filesize import pick_unit_and_suffix
from rich.text import Text

from vllm_dca.cli.doctor import findings
from vllm_dca.cli.explain import Explanation, find_out
from vllm_dca.cli.quiet import quiet_vllm
from vllm_dca.cli.serve_options import parse
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


def _to_write(path: Path) -> Path:
    """What exists typer tries itself."""
    if not path.exists():
        try:
            tempfile.TemporaryFile(dir=path.absolute().parent).close()
        except OSError as error:
            raise typer.BadParameter(f"cannot write {path}: {error.strerror}") from error
    return path


# As they stand, for vLLM's own parser.
WORDS = {"ignore_unknown_options": True}
Words = Annotated[
    list[str],
    typer.Argument(
        metavar="MODEL [OPTION]",
        help="A checkpoint's directory or name, and any option of `vllm serve`, such as "
        "--max-model-len 32K, --additional-config JSON (DCA's options), --hf-overrides JSON, "
        "--dtype, --kv-cache-dtype, --block-size, --tensor-parallel-size, "
        "--trust-remote-code. All are listed by `vllm serve --help=all`.",
    ),
]


@app.command(context_settings=WORDS)
def explain(
    words: Words,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the relative positions into this PNG file.")
    ] = None,
) -> None:
    """Say what DCA would do with a model, without its weights."""
    if plot is not None and importlib.util.find_spec("matplotlib") is None:
        errors.print("--plot needs matplotlib: pip install matplotlib")
        raise typer.Exit(1)
    with errors.status("Asking vLLM"), quiet_vllm() as warnings, _refusals():
        model, given = parse(words)
        explanation = find_out(model, given, warnings)
    _print_explanation(explanation, is_auto=given.get("max_model_len") == AUTO)
    _line("start it", shlex.join(_serve_command(words)))
    if plot is not None:
        from vllm_dca.cli.picture import draw

        with _refusals():
            draw(explanation.settings.geometry, explanation.max_model_len, plot)
        _line("picture", str(plot))


@app.command(context_settings=WORDS)
def calibrate(
    words: Words,
    text: Annotated[
        Path,
        typer.Option(
            exists=True, dir_okay=False, help="A long text like those that you will serve."
        ),
    ],
    recall: Annotated[
        float,
        typer.Option(min=0.1, max=1.0, help="Share of attention that each head must keep."),
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
) -> None:
    """Find budgets of sparse prefill for a model, on your own text."""
    from vllm_dca.cli.calibrate import run
    from vllm_dca.engine.calibrate import with_budgets

    with quiet_vllm() as warnings, _refusals():
        model, given = parse(words)
        additional = given.setdefault("additional_config", {})
        try:
            run(model, text, recall, output, given, console)
        finally:  # They may be why it failed.
            _print_warnings(warnings)
    # Budgets belong to the chunk sizes that they were found with.
    used = json.dumps(with_budgets(additional, output))
    _line("use it", f"--additional-config {shlex.quote(used)}")


@app.command()
def doctor() -> None:
    """Check the installation, one line for each check; exit code 1 if anything is wrong."""
    styles = {"ok": "green", "problem": "bold red", "note": "dim"}
    verdicts = set()
    with console.status("Asking vLLM"):
        for verdict, text in findings():
            console.print(Text.assemble((f"{verdict:<9}", styles[verdict]), text))
            verdicts.add(verdict)
    if "problem" in verdicts:
        raise typer.Exit(1)


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """What vLLM, DCA or the file system refuses is a message and exit code 1.

    vLLM says by an ImportError what an option needs to be installed, and by a RuntimeError why
    an engine failed, such as for want of memory.
    """
    from pydantic import ValidationError

    try:
        yield
    except ValidationError as error:
        messages = [
            ": ".join(
                [*map(str, reason["loc"][:1]), reason["msg"].removeprefix("Value error, ")]
            )
            for reason in error.errors()
        ]
        errors.print(Text("; ".join(messages)))
        raise typer.Exit(1) from error
    except (ValueError, OSError, ImportError, RuntimeError) as error:
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
    if found.stages > 1:
        rank += f", over the {found.stages} stages of the pipeline"
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


def _serve_command(words: list[str]) -> list[str]:
    backend = "--attention-backend"
    is_named = any(word.replace("_", "-").startswith(backend) for word in words)
    return ["vllm", "serve", *words, *([] if is_named else [backend, "dca"])]
