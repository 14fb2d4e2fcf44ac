"""`vllm-dca explain` on each kind of attention and of positions, from a config alone."""

import json
import types
from pathlib import Path
from typing import Any

import pytest

from scripts.models.recipe import FULL_MROPE
from scripts.models.recipes import RECIPES
from tests.helpers import checkpoints
from tests.helpers.children import Children
from tests.helpers.command_line import explained, run
from tests.helpers.inprocess import engine

pytestmark = pytest.mark.each_minor

OPTIONS = ("--max-model-len", "1024", "--block-size", "16")
ALL = "2 of 2 layers: 0-1"
WINDOW = "1 of 3 layers: 1; 0, 2 keep their sliding window of 40 tokens"
LONG = {
    "rope_parameters": checkpoints.SCALINGS["LongRoPE"],
    "original_max_position_embeddings": 32,
}
NTK = {"rope_parameters": checkpoints.SCALINGS["dynamic NTK"]}
# As Hunyuan's checkpoints have it.
NTK_ALPHA = {"rope_type": "dynamic", "alpha": 1000.0, "factor": 1.0, "rope_theta": 1e4}
# As Ministral 3's have it: queries grow with their position.
LLAMA4 = {**checkpoints.SCALINGS["YaRN"], "llama_4_scaling_beta": 0.1}


def write(directory: Path, architecture: str, **changes: Any) -> str:
    """A config as the sweep's, and no weights."""
    recipe = RECIPES[architecture]
    changes = {**recipe["changes"], **changes}
    return str(checkpoints.write_config(directory, recipe["config"], architecture, **changes))


@pytest.mark.parametrize(
    ("architecture", "changes", "attended", "softmax"),
    [
        ("Phi3ForCausalLM", LONG, ALL, None),
        ("LlamaForCausalLM", NTK, ALL, None),
        ("HunYuanDenseV1ForCausalLM", {"rope_parameters": NTK_ALPHA}, ALL, None),
        ("StableLmForCausalLM", {}, ALL, None),
        ("Ministral3ForCausalLM", {"rope_parameters": LLAMA4}, ALL, None),
        (
            "Gemma4ForCausalLM",
            {},
            "2 of 3 layers: 1-2; 0 keeps its sliding window of 40 tokens",
            None,
        ),
        ("Gemma2ForCausalLM", {}, WINDOW, "with a soft cap of 50"),
        ("GptOssForCausalLM", {}, WINDOW, "with sinks"),
        (
            "Qwen3NextForCausalLM",
            {},
            "1 of 2 layers: 1; 0 keeps its linear attention",
            None,
        ),
        ("FalconH1ForCausalLM", {}, f"{ALL}; 0-1 keep their Mamba", None),
        ("Lfm2ForCausalLM", {}, "1 of 2 layers: 1; 0 keeps its short convolutions", None),
    ],
)
def test_which_layers_are_attended(
    architecture: str,
    changes: dict[str, Any],
    attended: str,
    softmax: str | None,
    tmp_path: Path,
) -> None:
    said = explained(write(tmp_path, architecture, **changes), *OPTIONS)
    assert said["DCA attends"] == [attended]
    assert said.get("softmax") == (None if softmax is None else [softmax])
    # Whatever scales its positions, it was trained on what its config says.
    assert said["trained window"] == ["128 tokens"]
    assert said["chunk_size"] == ["96 tokens, derived from the trained window of 128 tokens"]


def test_a_drafter_s_layers(tmp_path: Path) -> None:
    model = write(tmp_path, "Qwen3NextForCausalLM", num_nextn_predict_layers=1)
    draft = json.dumps({"method": "mtp", "num_speculative_tokens": 1})
    said = explained(model, *OPTIONS, "--speculative-config", draft)
    assert said["DCA attends"] == ["1 of 2 layers: 1; 0 keeps its linear attention"]
    [drafter] = said["of the drafter"]
    assert drafter.startswith("1 of 1 layers: ")
    assert "of the drafter" not in explained(model, *OPTIONS)
    llama = write(tmp_path / "llama", "LlamaForCausalLM")
    draft = json.dumps({"model": llama, "num_speculative_tokens": 1, "method": "draft_model"})
    said = explained(llama, *OPTIONS, "--speculative-config", draft)
    assert (said["DCA attends"], said["of the drafter"]) == ([ALL], [ALL])


def test_a_drafter_s_own_cache_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FP8 is for GPUs: what refuses it on a CPU is told that this is one."""
    from vllm_dca.engine import backend, refusals

    gpu = types.SimpleNamespace(is_cpu=lambda: False, is_cuda=lambda: True)
    for module in (backend, refusals):
        monkeypatch.setattr(module, "current_platform", gpu)
    llama = write(tmp_path, "LlamaForCausalLM")
    draft = {"model": llama, "num_speculative_tokens": 1, "method": "draft_model"}
    # Keys and values of 2 layers with 2 KV heads of 16 entries.
    entries = 2 * 2 * 2 * 16
    for given, itemsize in ({}, 2), ({"kv_cache_dtype": "fp8"}, 1):
        config = json.dumps({**draft, **given})
        options = (*OPTIONS, "--dtype", "bfloat16", "--speculative-config", config)
        said = explained(llama, *options)["KV cache"][0]
        assert said.startswith(f"{entries * (2 + itemsize)} bytes a token")


def test_mrope(tmp_path: Path, children: Children) -> None:
    children.run("vision", _mrope, tmp_path)


def _mrope(directory: Path) -> None:
    three = {"num_hidden_layers": 3, "layer_types": ["linear_attention"] * 2}
    three["layer_types"] += ["full_attention"]
    model = write(
        directory, "Qwen3_5ForConditionalGeneration", rope_parameters=FULL_MROPE, **three
    )
    refused = run("explain", model, *OPTIONS)
    assert refused.exit_code == 1
    assert "image and video inputs with M-RoPE" in refused.stderr
    none = json.dumps({"image": 0, "video": 0})
    for flag in (["--language-model-only"], ["--limit-mm-per-prompt", none]):
        assert " ".join(flag) in refused.stderr.replace("'", "")
        said = explained(model, *OPTIONS, *flag)
        assert said["DCA attends"] == ["1 of 3 layers: 2; 0-1 keep their linear attention"]
        assert said["chunk_size"][0].startswith("96 tokens, derived from the trained window")
        assert flag[0] in said["start it"][0]


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("Llama4ForCausalLM", {}),
        ("Cohere2ForCausalLM", {}),
        ("VaultGemmaForCausalLM", {}),
    ],
)
def test_refusals_are_those_of_a_start(
    architecture: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    model = write(tmp_path, architecture, **changes)
    said = run("explain", model, *OPTIONS)
    assert said.exit_code == 1
    with pytest.raises(NotImplementedError) as refusal, engine(Path(model)):
        pass
    assert said.stderr.strip() == str(refusal.value)
