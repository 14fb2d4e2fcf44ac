"""What tests of the GPU's code in vLLM's engine share; see `tests.helpers.runners.under`."""

from pathlib import Path
from typing import Any

from tests.helpers.answers import ATOL, assert_close, of_answer
from vllm_dca.reference.model import prompt_logprobs

SIZES = {"chunk_size": 48, "local_size": 16}
DCA = {"additional_config": {"dca": {**SIZES, "prefill_provider": "triton"}}}
# Two steps for most prompts, cut at odd places.
OPTIONS: dict[str, Any] = {"max_model_len": 128, "max_num_batched_tokens": 53, **DCA}


def assert_agrees(model: Path, prompt: list[int], output: Any) -> None:
    """An answer has the reference's log-probabilities; past a chunk these are not ordinary."""
    tokens, logprobs = of_answer(output)
    expected = prompt_logprobs(model, prompt + tokens, **SIZES)[-len(tokens) :]
    assert_close(logprobs, expected)
    if len(prompt) > SIZES["chunk_size"]:
        ordinary = prompt_logprobs(model, prompt + tokens)[-len(tokens) :]
        assert (ordinary - expected).abs().max() > 10 * ATOL
