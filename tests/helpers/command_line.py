"""The command lines: of `vllm serve`, as vLLM itself parses it, and DCA's own."""

import subprocess
import sys
from typing import Any

from typer.testing import CliRunner, Result

from vllm_dca.cli import app

BLOCK = ("--block-size", "16")
# What vLLM's build for CUDA finds where there is no GPU.
NO_PLATFORM = """
import sys
sys.modules["vllm._C"] = None  # here it is the CPU's
from vllm import platforms
from vllm.platforms.interface import UnspecifiedPlatform
platforms._current_platform = UnspecifiedPlatform()
from vllm_dca.cli import app
app()
"""


def run(*arguments: str) -> Result:
    """`vllm-dca` with these arguments."""
    result = CliRunner().invoke(app, arguments)
    # Anything else is a traceback.
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert "Traceback" not in result.output
    return result


def without_a_platform(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`vllm-dca` with these arguments, in a process of its own."""
    command = [sys.executable, "-c", NO_PLATFORM, *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def explained(*arguments: str) -> dict[str, list[str]]:
    """What `vllm-dca explain` says under each label."""
    result = run("explain", *arguments)
    assert result.exit_code == 0, result.output
    said: dict[str, list[str]] = {}
    for line in result.stdout.splitlines():
        said.setdefault(line[:16].rstrip(), []).append(line[16:])
    return said


def served(words: list[str]) -> Any:
    """The engine's arguments, as `vllm serve` makes them from the words after it."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    try:
        from vllm.entrypoints.common.cli_args import make_arg_parser
    except ImportError:  # vLLM 0.32
        from vllm.entrypoints.launchers.cli_args import make_arg_parser

    parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(words)
    parsed.model = parsed.model_tag
    return AsyncEngineArgs.from_cli_args(parsed)
