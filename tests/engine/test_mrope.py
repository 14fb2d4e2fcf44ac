"""M-RoPE: its three axes are equal for text, which is served where nothing else can come."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import checkpoints, vision
from tests.helpers.answers import generate, of_answer, of_prompt
from tests.helpers.inprocess import engine, in_a_child
from vllm_dca.reference.model import prompt_logprobs

SIZES = {"chunk_size": 96, "local_size": 32}
ATOL = 1e-3
CHUNKED = {"mrope_section": [2, 3, 3], "rope_theta": 1e4}
INTERLEAVED = {"mrope_section": [4, 2, 2], "mrope_interleaved": True, "rope_theta": 1e4}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "chunked": ("Qwen2_5_VLConfig", {**CHUNKED, "rope_type": "default"}),
    "interleaved, with YaRN": ("Qwen3VLConfig", {**INTERLEAVED, **YARN}),
}


@pytest.fixture(autouse=True)
def _vision(monkeypatch: pytest.MonkeyPatch) -> None:
    # For the children: transformers looks for torchvision when it is imported.
    path = [*sys.path]
    environment = dict(os.environ)
    vision.for_children(environment, path)
    monkeypatch.setenv("PYTHONPATH", environment["PYTHONPATH"])
    monkeypatch.setattr(sys, "path", path)


def test_text_past_the_window(tmp_path: Path) -> None:
    in_a_child(_text_past_the_window, tmp_path)


def _text_past_the_window(directory: Path) -> None:
    """Prefills in pieces, a fresh and a cached prefix, tokens one by one."""
    from vllm.model_executor.layers.rotary_embedding import MRotaryEmbedding

    prompt = checkpoints.tokens(300)
    for name, (family, rope) in MODELS.items():
        model = checkpoints.write(directory / family, family, rope_parameters=rope)
        expected = prompt_logprobs(model, prompt, **SIZES)
        ordinary = prompt_logprobs(model, prompt)
        assert (ordinary - expected).abs().max() > 100 * ATOL, name
        options = {"additional_config": {"dca": SIZES}, "language_model_only": True}
        with engine(model, **options) as llm:
            assert llm.llm_engine.model_config.uses_mrope
            [kinds] = llm.apply_model(
                lambda model: [
                    type(layer.self_attn.rotary_emb)
                    for layer in model.language_model.model.layers
                ]
            )
            assert kinds == [MRotaryEmbedding] * 2
            [read] = generate(llm, [prompt], prompt_logprobs=0)
            answers = [generate(llm, [prompt], max_tokens=12)[0] for _ in range(2)]
        assert (of_prompt(read).double() - expected).abs().max() <= ATOL, name
        assert answers[1].num_cached_tokens >= 256
        for answer in answers:
            tokens, logprobs = of_answer(answer)
            of_answers = prompt_logprobs(model, prompt + tokens, **SIZES)[-12:]
            assert (logprobs.double() - of_answers).abs().max() <= ATOL, name


def test_images_are_refused_in_words_that_help(tmp_path: Path) -> None:
    in_a_child(_images_are_refused, tmp_path)


def _images_are_refused(directory: Path) -> None:
    from vllm.engine.arg_utils import EngineArgs

    changes = {
        "layer_types": ["linear_attention", "full_attention"],
        "rope_parameters": {**INTERLEAVED, "rope_type": "default"},
    }
    checkpoints.write_config(
        directory, "Qwen3_5Config", "Qwen3_5ForConditionalGeneration", **changes
    )
    given = {"attention_backend": "dca", "skip_tokenizer_init": True, "dtype": "bfloat16"}
    given |= {"block_size": 16, "additional_config": {"dca": SIZES}}
    message = ""
    try:
        EngineArgs(str(directory), **given).create_engine_config()
    except NotImplementedError as refusal:
        message = str(refusal)
    assert "image and video inputs with M-RoPE" in message
    assert "pass --language-model-only" in message
    # What it names works; an image that comes all the same is vLLM's to refuse, with a 4xx.
    for without in (
        {"language_model_only": True},
        {"limit_mm_per_prompt": {"image": 0, "video": 0}},
    ):
        config = EngineArgs(str(directory), **given, **without).create_engine_config()
        limits = config.model_config.multimodal_config
        assert limits.get_limit_per_prompt("image") == 0
        assert config.additional_config["dca"]["chunk_size"] == 96
