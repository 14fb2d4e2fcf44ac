"""Whole models by the reference, against transformers' own attention."""

from pathlib import Path
from typing import Any

import pytest
import torch

from scripts.models.recipes import RECIPES
from tests.helpers import checkpoints
from vllm_dca.reference.attention import dual_chunk_attention
from vllm_dca.reference.model import load, prompt_logprobs

LENGTH = 60
# Three chunks of it.
SIZES = {"chunk_size": 32, "local_size": 8}
# Products of other shapes add up in another order.
ATOL = 1e-11
# Query heads that share one of keys; a soft cap; sinks. The last two have windows besides.
MODELS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {},
    # By 50 hardly a score is capped; heads are of 32.
    "Gemma2ForCausalLM": {"attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 20},
    "GptOssForCausalLM": {},
}


def eager_logprobs(model: Path, tokens: list[int]) -> torch.Tensor:
    """By transformers' own code in fp64, where it takes its softmax in fp32 by itself."""
    from transformers import AutoModelForCausalLM

    made = AutoModelForCausalLM.from_pretrained(
        model,
        dtype=torch.float64,
        attn_implementation="eager",
        experts_implementation="eager",
    ).eval()

    def softmax(scores: torch.Tensor, dim: int, dtype: Any = None) -> torch.Tensor:
        return scores.softmax(dim)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "softmax", softmax)
        return logprobs(made, tokens)


def logprobs(made: Any, tokens: list[int]) -> torch.Tensor:
    """Of every token but the first."""
    with torch.inference_mode():
        logits = made(torch.tensor([tokens]), use_cache=False).logits[0]
    predicted = torch.tensor(tokens[1:])[:, None]
    return logits[:-1].log_softmax(-1).gather(1, predicted)[:, 0]


@pytest.mark.parametrize("architecture", MODELS)
def test_inside_a_chunk_it_is_transformers_own(architecture: str, tmp_path: Path) -> None:
    recipe = RECIPES[architecture]
    changes = {**recipe["changes"], **MODELS[architecture]}
    model = checkpoints.write(tmp_path, recipe["config"], **changes)
    tokens = checkpoints.tokens(LENGTH)
    right = eager_logprobs(model, tokens)
    ordinary = prompt_logprobs(model, tokens)
    torch.testing.assert_close(ordinary, right, rtol=0, atol=ATOL)
    one_chunk = prompt_logprobs(model, tokens, chunk_size=LENGTH + 1, local_size=1)
    torch.testing.assert_close(one_chunk, right, rtol=0, atol=ATOL)
    # Else this could not tell chunks from none.
    assert (prompt_logprobs(model, tokens, **SIZES) - right).abs().max() > 1e-2


def test_past_a_chunk_each_layer_is_dual_chunk_attention(tmp_path: Path) -> None:
    """Of queries and keys that transformers leaves unrotated."""
    model = checkpoints.write(tmp_path, "LlamaConfig")
    tokens = checkpoints.tokens(LENGTH)

    def attention(
        module: Any, query: Any, key: Any, value: Any, mask: Any, **_: Any
    ) -> tuple[torch.Tensor, None]:
        unrotated = (each[0].transpose(0, 1) for each in (query, key, value))
        options = {"inv_freq": frequencies, "scale": module.scaling, **SIZES}
        return dual_chunk_attention(*unrotated, **options)[None], None

    made = load(model, attention, torch.float64)
    frequencies = made.model.rotary_emb.inv_freq.double()
    made.model.rotary_emb.inv_freq.zero_()
    # Before another attention takes this one's name.
    right = logprobs(made, tokens)
    found = prompt_logprobs(model, tokens, **SIZES)
    # transformers takes cosines and sines in fp32: no more than if it took all so.
    allowed = (prompt_logprobs(model, tokens, dtype=torch.float32, **SIZES) - found).abs().max()
    assert allowed < 1e-3
    assert (found - right).abs().max() <= allowed
