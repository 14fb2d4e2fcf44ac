"""What tests of engines share beside ../conftest.py."""

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def models_are_inspected_here() -> Iterator[None]:
    """Not each in a process of its own, for seconds: tests import the model in any case."""
    from vllm.model_executor.models import registry

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_run_in_subprocess", lambda inspect: inspect())
        yield
