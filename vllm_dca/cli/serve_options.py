"""The options of `vllm serve`, as vLLM itself parses them."""

import dataclasses
from typing import Any, NoReturn

import typer


def parse(words: list[str]) -> tuple[str, dict[str, Any]]:
    """Read what stands behind `vllm serve`.

    Returns:
        The model, and what was given of the engine's options. A server's own, such as its port,
        change no engine.

    Raises:
        ValueError: vLLM found no platform, or another attention backend is asked for.
        IncompatibleVllmError: see `vllm_dca.engine.shims.apply`.
        typer.BadParameter: `vllm serve` would not understand it.
    """
    from vllm_dca.engine import shims

    shims.apply()
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    try:
        from vllm.entrypoints.common.cli_args import make_arg_parser
    except ImportError:  # vLLM 0.32
        from vllm.entrypoints.launchers.cli_args import make_arg_parser

    class Parser(FlexibleArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise typer.BadParameter(message)

    if not current_platform.device_type:
        raise ValueError(
            "vLLM found no platform: its build for CUDA sees no GPU here (vllm-dca doctor). "
            "explain does without one: VLLM_TARGET_DEVICE=cpu vllm-dca explain ..."
        )
    parser = make_arg_parser(Parser(add_help=False))
    parsed = vars(parser.parse_args(words))
    given = {
        field.name: parsed[field.name]
        for field in dataclasses.fields(EngineArgs)
        if field.name in parsed and parsed[field.name] != parser.get_default(field.name)
    }
    named = given.pop("model", None)
    model = parsed["model_tag"] or named
    if model is None:
        parser.error("MODEL is missing")
    if not isinstance(additional := given.get("additional_config", {}), dict):
        parser.error(f"--additional-config {additional} is not a JSON object")
    backend = given.pop("attention_backend", shims.NAME)
    if backend.upper() != shims.NAME:
        raise ValueError(
            f"vllm-dca is about --attention-backend dca: remove --attention-backend {backend}"
        )
    return model, given
