"""What these tests share."""

import pytest

from tests.helpers import checkpoints
from tests.helpers.inprocess import models_are_inspected_here

__all__ = ["models_are_inspected_here"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(
        checkpoints.write_config(
            tmp_path_factory.mktemp("llama"), "LlamaConfig", "LlamaForCausalLM"
        )
    )
