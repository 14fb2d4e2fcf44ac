"""Every family with every RoPE scaling and several block sizes: `scripts/test -m nightly`."""

from pathlib import Path

import pytest

from tests.helpers import checkpoints
from tests.helpers.answers import ATOL, generate, of_prompt
from tests.helpers.checkpoints import SIZES
from tests.helpers.inprocess import engine, in_a_child
from vllm_dca.reference.model import prompt_logprobs

pytestmark = pytest.mark.nightly
PROMPT = checkpoints.tokens(300)
BLOCK_SIZES = (8, 32, 64)


@pytest.mark.parametrize("family", checkpoints.FAMILIES)
def test_family(family: str, tmp_path: Path) -> None:
    # vLLM changes the classes that it takes from transformers, for the rest of the process.
    in_a_child(_family, family, tmp_path)


def _family(family: str, directory: Path) -> None:
    expected = {}
    for scaling in ("none", *checkpoints.SCALINGS):
        if family == "Phi3Config" and scaling not in ("none", "LongRoPE"):
            continue  # Its config knows no others.
        if scaling == "LongRoPE" and family not in ("LlamaConfig", "Phi3Config"):
            continue  # Its factors are as many as a head has frequencies.
        changes = dict(checkpoints.FAMILIES[family])
        if scaling == "LongRoPE":
            changes["original_max_position_embeddings"] = 32
        if scaling != "none":
            rope = dict(checkpoints.SCALINGS[scaling])
            if "partial_rotary_factor" in changes:
                rope["partial_rotary_factor"] = changes["partial_rotary_factor"]
            changes = {**changes, "rope_parameters": rope}
        model = checkpoints.write(directory / scaling, family, **changes)
        expected[scaling] = prompt_logprobs(model, PROMPT, **SIZES)
        ordinary = prompt_logprobs(model, PROMPT)
        assert (ordinary - expected[scaling]).abs().max() > 100 * ATOL
    for scaling, logprobs in expected.items():
        for block_size in BLOCK_SIZES:
            options = {"block_size": block_size, "num_gpu_blocks_override": 3200 // block_size}
            model = directory / scaling
            with engine(model, additional_config={"dca": SIZES}, **options) as llm:
                [output] = generate(llm, [PROMPT], prompt_logprobs=0)
            error = (of_prompt(output).double() - logprobs).abs().max()
            assert error <= ATOL, f"{scaling}, pages of {block_size}: off by {error}"
