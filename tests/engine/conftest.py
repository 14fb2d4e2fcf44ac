"""What tests of engines share beside ../conftest.py."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers import checkpoints
from tests.helpers.inprocess import models_are_inspected_here
from tests.helpers.patched.overlays import SETUPS, make_overlay

__all__ = ["models_are_inspected_here"]


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random checkpoint with a window of 128 tokens, which tests must not change."""
    return checkpoints.write(tmp_path_factory.mktemp("llama"), "LlamaConfig")


@pytest.fixture(scope="session")
def overlays(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path | None]:
    """The folder of a vLLM with the patches of a setup; None where there are none."""
    made: dict[str, Path] = {}

    def overlay(setup: str) -> Path | None:
        if SETUPS[setup] and setup not in made:
            made[setup] = make_overlay(tmp_path_factory.mktemp(setup), SETUPS[setup])
        return made.get(setup)

    return overlay
