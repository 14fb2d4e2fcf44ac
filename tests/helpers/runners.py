"""vLLM's two model runners: one test under both, each in a process of its own.

V1 is the CPU's default and V2 is CUDA's. Which of them an engine takes is settled when vLLM is
imported, so the bodies of such tests run in a child, one for all of a module's.
"""

import functools
import importlib
import inspect
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest

from tests.helpers import model_runner_v2


def _v1() -> None:
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"


START: dict[str, Callable[[], None]] = {"V1": _v1, "V2": model_runner_v2.activate}


def start(runner: str) -> ProcessPoolExecutor:
    """A process in which engines have that runner."""
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), START[runner])


def under(*runners: str, apart: tuple[str, ...] = ()) -> Callable[[Callable[..., None]], Any]:
    """Run a test in a child, once with each of the runners; its arguments are pickled.

    Args:
        runners: V1, V2.
        apart: those with which it has a child of its own, for what leaves traces that later
            engines would meet.
    """

    def decorate(function: Callable[..., None]) -> Any:
        @functools.wraps(function)
        def test(runner: tuple[str, ProcessPoolExecutor], **arguments: Any) -> None:
            name, child = runner
            body = functools.partial(_run, function.__module__, function.__name__, arguments)
            if name not in apart:
                child.submit(body).result()
                return
            with start(name) as own:
                own.submit(body).result()

        parameters = inspect.signature(function).parameters.values()
        first = inspect.Parameter("runner", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        test.__signature__ = inspect.Signature([first, *parameters])  # type: ignore[attr-defined]
        return pytest.mark.parametrize("runner", runners, indirect=True, scope="module")(test)

    return decorate


def _run(module: str, name: str, arguments: dict[str, Any]) -> None:
    from tests.helpers import interpreter

    interpreter.patch_for_good()
    getattr(importlib.import_module(module), name).__wrapped__(**arguments)
