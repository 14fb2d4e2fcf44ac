"""What drafters are refused at start-up, in words that help."""

import re
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.inprocess import settle

pytestmark = pytest.mark.each_minor


def test_a_drafter_with_another_backend_is_refused(llama: Path) -> None:
    draft = {"method": "draft_model", "model": str(llama), "num_speculative_tokens": 2}
    message = "drafting with CPU_ATTN, the speculative config's attention_backend"
    with pytest.raises(NotImplementedError, match=message):
        settle(llama, speculative_config={**draft, "attention_backend": "CPU_ATTN"})
    settle(llama, speculative_config={**draft, "attention_backend": "DCA"})


def test_dca_for_a_drafter_alone_is_refused(llama: Path) -> None:
    """Before any weights are read, and whoever the drafter is."""
    draft = {"num_speculative_tokens": 2, "attention_backend": "DCA"}
    drafters = ({"method": "draft_model", "model": str(llama)}, {"method": "ngram"})
    for drafter in drafters:
        options = {"attention_backend": None, "speculative_config": {**draft, **drafter}}
        with pytest.raises(ValueError, match="DCA needs --attention-backend dca too"):
            settle(llama, **options)
        # What it names works.
        settle(llama, **{**options, "attention_backend": "dca"})


@pytest.mark.parametrize(
    "given",
    [
        "int8_per_token_head",
        "nvfp4",
        "bfloat16",
        pytest.param(
            "fp8", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="served there")
        ),
    ],
)
def test_a_drafter_s_own_cache_is_refused(given: str, llama: Path) -> None:
    """Before any weights are read, and not in the words of the model's."""
    draft = {"method": "draft_model", "model": str(llama), "num_speculative_tokens": 2}
    words = f"the speculative config's kv_cache_dtype {given} (without it the drafter"
    with pytest.raises(NotImplementedError, match=re.escape(words)) as refusal:
        settle(llama, speculative_config={**draft, "kv_cache_dtype": given})
    assert "--kv-cache-dtype" not in str(refusal.value)
    settle(llama, speculative_config={**draft, "kv_cache_dtype": "auto"})


def test_a_drafter_s_own_cache_that_is_served(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a model in bfloat16 its own dtype, and on a GPU FP8."""
    from vllm_dca.engine import refusals

    draft = {"method": "draft_model", "model": str(llama), "num_speculative_tokens": 2}
    draft |= {"kv_cache_dtype": "bfloat16"}
    config = settle(llama, dtype="bfloat16", speculative_config=draft)
    config.speculative_config.kv_cache_dtype = "fp8_e5m2"
    gpu = types.SimpleNamespace(is_cpu=lambda: False, is_cuda=lambda: True)
    monkeypatch.setattr(refusals, "current_platform", gpu)
    assert refusals.refusals(config) == []


def test_a_predictor_without_keys_of_its_own_is_refused(llama: Path) -> None:
    """Gemma 4's, which is an "mtp" as others are that DCA serves."""
    from vllm_dca.engine.refusals import refusals

    draft = {"method": "draft_model", "model": str(llama), "num_speculative_tokens": 2}
    speculative = (config := settle(llama, speculative_config=draft)).speculative_config
    speculative.method = "mtp"
    assert refusals(config) == []
    speculative.draft_model_config.hf_config.model_type = "gemma4_mtp"
    [refused] = refusals(config)
    assert refused.startswith("speculative decoding by Gemma 4's own multi-token predictor (")


def refused_of_a_drafter(llama: Path, **changes: Any) -> list[str]:
    """Where its config is changed after vLLM's own checks."""
    from vllm_dca.engine.refusals import refusals

    draft = {"method": "draft_model", "model": str(llama), "num_speculative_tokens": 2}
    config = settle(llama, speculative_config=draft)
    for name, value in changes.items():
        setattr(config.speculative_config, name, value)
    return refusals(config)


@pytest.mark.parametrize("method", ["draft_model", "mtp"])
def test_adaptive_verification_is_refused(method: str, llama: Path) -> None:
    """vLLM refuses it where there are no CUDA graphs, and else once the model is loaded."""
    asked = {"enable_adaptive_verification": True}
    assert refused_of_a_drafter(llama, method=method) == []
    [words] = refused_of_a_drafter(llama, method=method, **asked)
    assert words.startswith("adaptive verification of drafts, the speculative config's enable_")
    # vLLM does nothing about it there.
    assert refused_of_a_drafter(llama, method="ngram", **asked) == []


@pytest.mark.parametrize("method", ["draft_model", "eagle3"])
def test_parallel_drafting_is_refused(method: str, llama: Path) -> None:
    """Its drafts are in the device's lengths, and not in those that the host is told."""
    assert refused_of_a_drafter(llama, method=method) == []
    words = f"parallel drafting by {method} (draft one token after the other)"
    assert refused_of_a_drafter(llama, method=method, parallel_drafting=True) == [words]
    draft = {"method": "draft_model", "model": str(llama), "num_speculative_tokens": 2}
    with pytest.raises(NotImplementedError, match="parallel drafting by draft_model"):
        settle(llama, speculative_config={**draft, "parallel_drafting": True})
