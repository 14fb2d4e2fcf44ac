"""Every family with every RoPE scaling and several block sizes: `scripts/test -m nightly`."""

from pathlib import Path

import pytest
import torch

from tests import checkpoints
from tests.answers import generate, of_prompt
from tests.inprocess import engine
from vllm_dca.reference_model import prompt_logprobs

pytestmark = pytest.mark.nightly
ATOL = 1e-3
SIZES = {"chunk_size": 96, "local_size": 32}
PROMPT = checkpoints.tokens(300)


@pytest.mark.parametrize("scaling", ["none", *checkpoints.SCALINGS])
@pytest.mark.parametrize("family", checkpoints.FAMILIES)
def test_family(family: str, scaling: str, tmp_path: Path) -> None:
    changes = checkpoints.FAMILIES[family]
    if scaling != "none":
        rope = checkpoints.SCALINGS[scaling]
        partial = changes.get("partial_rotary_factor")
        if partial is not None:
            rope = {**rope, "partial_rotary_factor": partial}
        changes = {**changes, "rope_parameters": rope}
    model = checkpoints.write(tmp_path, family, **changes)
    expected = prompt_logprobs(model, PROMPT, **SIZES)
    assert (prompt_logprobs(model, PROMPT) - expected).abs().max() > 100 * ATOL
    for block_size in (8, 32, 64):
        options = {"block_size": block_size, "num_gpu_blocks_override": 3200 // block_size}
        with engine(model, additional_config={"dca": SIZES}, **options) as llm:
            [output] = generate(llm, [PROMPT], prompt_logprobs=0)
        torch.testing.assert_close(of_prompt(output).double(), expected, rtol=0, atol=ATOL)
