"""Processes that tests run in, for what is settled when vLLM or transformers is imported."""

import multiprocessing
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from typing import Any

import pytest

from tests.helpers import model_runner_v2, vision
from tests.helpers.inprocess import inspect_models_here


def _v1() -> None:
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"


def _vision() -> None:
    vision.for_children(os.environ, sys.path)
    inspect_models_here(pytest.MonkeyPatch())


START: dict[str, Callable[[], None]] = {
    "V1": _v1,
    "V2": model_runner_v2.activate,
    "vision": _vision,
}


def start(kind: str) -> ProcessPoolExecutor:
    """A process in which engines have that runner, or that can import torchvision."""
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), START[kind])


class Children(ExitStack):
    """One of each kind, from the first test that asks for it on."""

    def __init__(self) -> None:
        super().__init__()
        self._started: dict[str, ProcessPoolExecutor] = {}

    def run(self, kind: str, function: Callable[..., None], *args: Any) -> None:
        """Run it in the one of that kind, errors and all; arguments are pickled."""
        if kind not in self._started:
            self._started[kind] = self.enter_context(start(kind))
        try:
            self._started[kind].submit(function, *args).result()
        except BrokenProcessPool:
            del self._started[kind]  # the next test has another
            raise
