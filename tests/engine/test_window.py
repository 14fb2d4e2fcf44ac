"""The trained window, of a model and of its drafter: how far positions may go."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from scripts.common.record import ROOT
from tests.helpers import checkpoints, log
from tests.helpers.answers import accepted, drafted, generate
from tests.helpers.checkpoints import SIZES
from tests.helpers.children import Children
from tests.helpers.command_line import BLOCK, explained, served
from tests.helpers.companions import write_eagle
from tests.helpers.inprocess import engine, settle
from tests.helpers.rehearsal import OPTIONS, assert_agrees
from tests.helpers.runners import under

pytestmark = pytest.mark.each_minor

WINDOWS_OFF: dict[str, Any] = {"disable_sliding_window": True, "block_size": 8}
ONE_OF_TWO = ["sliding_attention", "full_attention"]


def window_of(model: Path, **options: Any) -> int:
    """The one that DCA takes for trained."""
    return int(settle(model, **options).additional_config["dca"]["window"])


@pytest.mark.parametrize(("max_model_len", "window"), [(32, 32), (33, 128), (1024, 128)])
def test_a_window_goes_with_the_factors_that_are_used(
    max_model_len: int, window: int, tmp_path: Path
) -> None:
    """LongRoPE has short ones up to 32 tokens, and long ones where a request may be longer."""
    rope = checkpoints.SCALINGS["LongRoPE"]
    changes = {"rope_parameters": rope, "original_max_position_embeddings": 32}
    model = checkpoints.write_config(tmp_path, "Phi3Config", "Phi3ForCausalLM", **changes)
    config = settle(model, max_model_len=max_model_len)
    assert config.additional_config["dca"]["window"] == window


def test_yarn_widens_the_window_as_the_documentation_says(tmp_path: Path) -> None:
    """And not without max_position_embeddings, which vLLM takes for a length reached."""
    rope = {"rope_type": "default", "rope_theta": 100000}
    changes = {"rope_parameters": rope, "max_position_embeddings": 8192}
    model = checkpoints.write_config(tmp_path, "LlamaConfig", "LlamaForCausalLM", **changes)
    text = (ROOT / "docs/configuration.md").read_text()
    [command] = re.findall(r"```\n(vllm serve [^`]*yarn[^`]*)```", text)
    words = [str(model), *shlex.split(command.replace("\\\n", " "))[3:], *BLOCK]
    given = served(words).hf_overrides
    assert given["rope_parameters"]["rope_theta"] == rope["rope_theta"]
    assert window_of(model) == 8192
    assert window_of(model, hf_overrides=given) == 16384
    said = explained(*[word for word in words if word not in ("--attention-backend", "dca")])
    assert said["trained window"] == ["16384 tokens"]
    del given["max_position_embeddings"]
    assert window_of(model, hf_overrides=given) == 8192


@pytest.mark.parametrize(
    ("config", "changes", "window"),
    [
        ("MistralConfig", {"sliding_window": 32}, 32),
        ("MistralConfig", {"sliding_window": 256}, 128),
        ("MistralConfig", {"sliding_window": 0}, 128),
        ("MistralConfig", {"sliding_window": None}, 128),
        ("Gemma2Config", {"sliding_window": 32, "layer_types": ONE_OF_TWO}, 32),
        # vLLM multiplies either by the factor, and so it does what is switched off.
        (
            "MistralConfig",
            {"sliding_window": 32, "rope_parameters": checkpoints.SCALINGS["linear"]},
            64,
        ),
        (
            "MistralConfig",
            {"sliding_window": 32, "rope_parameters": checkpoints.SCALINGS["dynamic NTK"]},
            32,
        ),
    ],
)
def test_no_layer_saw_more_than_the_window_that_is_switched_off(
    config: str, changes: dict[str, Any], window: int, tmp_path: Path
) -> None:
    """As vLLM has it, which has forgotten it when DCA asks."""
    architecture = config.replace("Config", "ForCausalLM")
    model = checkpoints.write_config(tmp_path, config, architecture, **changes)
    assert window_of(model, max_model_len=1024, **WINDOWS_OFF) == window
    if "dynamic" not in str(changes):
        alone = settle(model, attention_backend=None, **WINDOWS_OFF)
        assert alone.model_config.max_model_len == window


def test_the_window_that_is_switched_off_may_be_of_a_config_elsewhere(tmp_path: Path) -> None:
    """--hf-config-path, which vLLM reads in place of the model's own."""
    model, other = (
        checkpoints.write_config(
            tmp_path / str(size), "MistralConfig", "MistralForCausalLM", sliding_window=size
        )
        for size in (32, 64)
    )
    assert window_of(model, hf_config_path=str(other), **WINDOWS_OFF) == 64


@pytest.mark.parametrize("max_model_len", [32, 1024])
def test_a_window_that_is_switched_off_goes_before_longrope(
    max_model_len: int, tmp_path: Path
) -> None:
    rope = checkpoints.SCALINGS["LongRoPE"]
    changes = {"rope_parameters": rope, "original_max_position_embeddings": 32}
    model = checkpoints.write_config(
        tmp_path, "Phi3Config", "Phi3ForCausalLM", sliding_window=16, **changes
    )
    options = {**WINDOWS_OFF, "block_size": 4}
    assert window_of(model, max_model_len=max_model_len, **options) == 16


def test_the_window_that_is_switched_off_may_be_the_user_s(
    tmp_path: Path, children: Children
) -> None:
    changes = {"layer_types": ONE_OF_TWO, "sliding_window": 64}
    model = checkpoints.write_config(
        tmp_path / "text", "Gemma3TextConfig", "Gemma3ForCausalLM", **changes
    )
    overrides: dict[str, Any] = {"sliding_window": 32}
    assert window_of(model, hf_overrides=overrides, **WINDOWS_OFF) == 32
    children.run("vision", _overridden_beside_a_tower, tmp_path / "both", changes, overrides)


def _overridden_beside_a_tower(directory: Path, changes: Any, overrides: Any) -> None:
    architecture = "Gemma3ForConditionalGeneration"
    model = checkpoints.write_config(directory, "Gemma3Config", architecture, **changes)
    options = {"language_model_only": True, "hf_overrides": {"text_config": overrides}}
    assert window_of(model, **options, **WINDOWS_OFF) == 32


def test_a_drafter_does_not_shorten_the_context(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM 0.33 does that for Model Runner V2 before DCA extends the drafter too."""
    import vllm.envs
    from vllm.config import VllmConfig

    vllm.envs.disable_envs_cache()
    # Without Triton, vLLM 0.32 refuses to be asked for that runner.
    if hasattr(VllmConfig, "_limit_max_model_len_to_draft"):
        monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    draft = {"method": "draft_model", "model": str(llama), "num_speculative_tokens": 2}
    config = settle(llama, max_model_len=1024, speculative_config=draft)
    assert config.model_config.max_model_len == 1024
    assert config.speculative_config.draft_model_config.max_model_len == 1024


def test_a_drafter_with_a_shorter_window_is_warned_of(
    llama: Path, tmp_path: Path, dca_log: list[str]
) -> None:
    """vLLM lets an EAGLE head's config tell the model's length."""
    head = write_eagle(tmp_path, "eagle")
    config = json.loads((head / "config.json").read_text())
    (head / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 64}))
    draft = {"method": "eagle", "model": str(head), "num_speculative_tokens": 2}
    settle(
        llama,
        max_model_len=1024,
        speculative_config=draft,
        additional_config={"dca": SIZES},
    )
    assert sum("over the drafter's window of 64 tokens" in line for line in dca_log) == 1


@pytest.mark.parametrize("method", ["draft_model", "eagle"])
def test_a_drafter_goes_no_further_than_the_user_says(
    method: str, llama: Path, tmp_path: Path, dca_log: list[str]
) -> None:
    """Past it vLLM asks it for nothing, so that its own window never matters."""
    head = llama if method == "draft_model" else write_eagle(tmp_path, method)
    draft = {"method": method, "model": str(head), "num_speculative_tokens": 2}
    config = settle(
        llama,
        max_model_len=1024,
        additional_config={"dca": {"chunk_size": 256, "local_size": 64}},
        speculative_config={**draft, "max_model_len": 100},
    )
    assert config.speculative_config.draft_model_config.max_model_len == 100
    assert config.model_config.max_model_len == 1024
    assert config.speculative_config.attention_backend.name == "DCA"
    assert not any("drafter's window" in line for line in dca_log)


@under("V1", "V2")
def test_answers_past_the_drafter_s_length_are_right(tmp_path: Path) -> None:
    """V1 stops drafting there. V2 cannot, so the drafter's table goes as far as the model's."""
    llama = checkpoints.write(tmp_path, "LlamaConfig")
    draft = {"method": "draft_model", "model": str(llama), "num_speculative_tokens": 3}
    draft |= {"max_model_len": 40}
    prompts = [checkpoints.tokens(60), checkpoints.tokens(29)]
    with log.collected() as lines, engine(llama, speculative_config=draft, **OPTIONS) as llm:
        config = llm.llm_engine.vllm_config
        is_v2 = config.use_v2_model_runner
        warned = "drafting does not stop at the speculative config's max_model_len of 40"
        assert sum(warned in line for line in lines) == is_v2
        assert config.model_config.max_model_len == OPTIONS["max_model_len"]
        of_the_drafter = config.speculative_config.draft_model_config.max_model_len
        assert of_the_drafter == (OPTIONS["max_model_len"] if is_v2 else 40)
        [long] = generate(llm, prompts[:1], max_tokens=9)
        # The model drafts for itself: if its layers attend as they should, each draft is right.
        # In place of drafts V1 verifies zeros.
        assert accepted(llm) == (drafted(llm) if is_v2 else 0)
        assert drafted(llm) > 3
        [short] = generate(llm, prompts[1:], max_tokens=20)
    for prompt, output in zip(prompts, (long, short), strict=True):
        assert_agrees(llama, prompt, output)


@under("V2")
def test_a_drafter_shortens_no_context_that_nobody_asked_for(tmp_path: Path) -> None:
    """vLLM 0.33 lowers the model's own length as well, or that by auto."""
    llama = checkpoints.write_config(tmp_path, "LlamaConfig", "LlamaForCausalLM")
    draft = {"method": "draft_model", "model": str(llama), "num_speculative_tokens": 3}
    draft |= {"max_model_len": 40}
    for given in ({}, {"max_model_len": -1}):
        config = settle(llama, speculative_config=draft, **given)
        assert config.model_config.max_model_len == 128
        assert config.speculative_config.draft_model_config.max_model_len == 128
