"""What the tests on Ray serve: a tiny Llama, by options that go through JSON too."""

from pathlib import Path
from typing import Any

from tests.helpers import checkpoints
from tests.helpers.checkpoints import SIZES

OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "block_size": 16,
    "max_num_batched_tokens": 100,
    "num_gpu_blocks_override": 200,
    "additional_config": {"dca": SIZES},
}


def write_model(directory: Path) -> Path:
    """With a tokenizer."""
    checkpoints.write_tokenizer(checkpoints.write(directory, "LlamaConfig"))
    return directory
