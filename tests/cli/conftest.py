"""What these tests share."""

import pytest

from tests.helpers import checkpoints


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(
        checkpoints.write_config(
            tmp_path_factory.mktemp("llama"), "LlamaConfig", "LlamaForCausalLM"
        )
    )
