"""What tests of engines share beside ../conftest.py."""

from collections.abc import Iterator

import pytest

from tests.helpers.inprocess import inspect_models_here


@pytest.fixture(scope="package", autouse=True)
def models_are_inspected_here() -> Iterator[None]:
    """For configs that a test makes without an engine."""
    with pytest.MonkeyPatch.context() as patch:
        inspect_models_here(patch)
        yield
