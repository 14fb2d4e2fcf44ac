"""The command line of `vllm serve`, as vLLM itself parses it."""

from typing import Any


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
