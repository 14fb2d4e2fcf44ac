"""vLLM's two model runners: one test under both, each in a process of its own.

V1 is the CPU's default and V2 is CUDA's. Which of them an engine takes is settled when vLLM is
imported, so the bodies of such tests run in a child, one for all of a session's.
"""

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import pytest

from tests.helpers.children import Children


def under(
    *runners: str, apart: tuple[str, ...] = (), nightly: tuple[str, ...] = ()
) -> Callable[[Callable[..., None]], Any]:
    """Run a test in a child, once with each of the runners; its arguments are pickled.

    Args:
        runners: V1, V2.
        apart: those with which it has a child of its own, for what leaves traces that later
            engines would meet.
        nightly: those with which it runs nightly only.
    """

    def decorate(function: Callable[..., None]) -> Any:
        @functools.wraps(function)
        def test(runner: str, children: Children, **arguments: Any) -> None:
            with Children() as own:
                of_which = own if runner in apart else children
                of_which.run(runner, _run, function.__module__, function.__name__, arguments)

        first = [
            inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD)
            for name in ("runner", "children")
        ]
        parameters = inspect.signature(function).parameters.values()
        test.__signature__ = inspect.Signature([*first, *parameters])  # type: ignore[attr-defined]
        each = [
            pytest.param(runner, marks=[pytest.mark.nightly] * (runner in nightly))
            for runner in runners
        ]
        return pytest.mark.parametrize("runner", each)(test)

    return decorate


def _run(module: str, name: str, arguments: dict[str, Any]) -> None:
    from tests.helpers import interpreter

    interpreter.patch_for_good()
    getattr(importlib.import_module(module), name).__wrapped__(**arguments)
