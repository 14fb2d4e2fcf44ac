"""What KV caches are refused at start-up, in words that help."""

import json
from pathlib import Path

import pytest
import torch

from scripts.models.recipes import RECIPES
from tests.helpers import checkpoints
from tests.helpers.answers import generate
from tests.helpers.checkpoints import SIZES
from tests.helpers.inprocess import engine, settle

pytestmark = pytest.mark.each_minor

SCHEMES = {
    "compressed-tensors": {
        "config_groups": {},
        "kv_cache_scheme": {
            "num_bits": 8,
            "type": "float",
            "strategy": "tensor",
            "dynamic": False,
            "symmetric": True,
        },
    },
    "modelopt": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["*"]},
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="served there")
@pytest.mark.parametrize("method", SCHEMES)
def test_a_cache_that_the_checkpoint_asks_for_is_refused_in_words_that_help(
    method: str, tmp_path: Path
) -> None:
    """`auto` would be the same again."""
    scheme = {"quant_method": method, **SCHEMES[method]}
    model = checkpoints.write_config(
        tmp_path, "LlamaConfig", "LlamaForCausalLM", quantization_config=scheme
    )
    message = r"checkpoint's KV cache in fp8\S* \(use --kv-cache-dtype bfloat16\)"
    for given in ({}, {"kv_cache_dtype": "auto"}):
        with pytest.raises(NotImplementedError, match=message):
            settle(model, dtype="bfloat16", **given)
    message = r"--kv-cache-dtype fp8_e5m2 \(use --kv-cache-dtype bfloat16\)"
    with pytest.raises(NotImplementedError, match=message):
        settle(model, dtype="bfloat16", kv_cache_dtype="fp8_e5m2")
    settle(model, dtype="bfloat16", kv_cache_dtype="bfloat16")


@pytest.mark.skipif(torch.cuda.is_available(), reason="served there")
def test_model_dtype_overrides_checkpoint_cache_dtype(tmp_path: Path) -> None:
    """What the refusal names works, in the layers too."""
    method = "compressed-tensors"
    model = checkpoints.write(tmp_path, "LlamaConfig")
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, **SCHEMES[method]}
    (model / "config.json").write_text(json.dumps(config))
    with engine(model, dtype="bfloat16", kv_cache_dtype="bfloat16") as llm:
        [dtypes] = llm.apply_model(
            lambda model: [layer.self_attn.attn.kv_cache.dtype for layer in model.model.layers]
        )
        assert dtypes == [torch.bfloat16] * 2
        generate(llm, [checkpoints.tokens(20)])


def test_caches_that_no_device_reads(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a checkpoint for CUDA, and of a float32 model, whose dtype no cache has by name."""
    from vllm_dca.engine.refusals import refusals

    config = settle(llama)
    quantised = {"quant_method": "modelopt", "kv_cache_quant_algo": "NVFP4"}
    config.model_config.hf_config.quantization_config = quantised
    config.cache_config.cache_dtype = "nvfp4"
    of_half = "the checkpoint's KV cache in nvfp4 (use --kv-cache-dtype bfloat16)"
    of_full = of_half.replace("(use --kv", "(use --dtype bfloat16 --kv")
    assert refusals(config) == [of_full]
    config.model_config.dtype = torch.bfloat16
    assert refusals(config) == [of_half]


@pytest.mark.parametrize(
    ("dtype", "works"), [(torch.bfloat16, "bfloat16"), (torch.float32, "auto")]
)
def test_a_cache_of_another_dtype_is_refused_in_words_that_help(
    dtype: torch.dtype, works: str
) -> None:
    from vllm.platforms.interface import DeviceCapability

    from vllm_dca.engine.backend import DcaBackend

    found = DcaBackend.supports_combination(
        64, dtype, "float16", 16, False, False, False, False, DeviceCapability(9, 0)
    )
    assert found == f"--kv-cache-dtype float16 with a {dtype} model; use {works}"


@pytest.mark.skipif(torch.cuda.is_available(), reason="vLLM splits pages there, and says so")
def test_pages_that_cannot_be_split_are_refused_as_the_engine_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside Mamba layers pages are of 48 tokens, and of a chunk only 16 divide them."""
    import vllm.envs

    recipe = RECIPES["GraniteMoeHybridForCausalLM"]
    changes = {**recipe["changes"], "num_hidden_layers": 4}
    changes["layer_types"] = ["mamba", "attention"] * 2
    model = checkpoints.write(tmp_path, recipe["config"], **changes)
    vllm.envs.disable_envs_cache()
    monkeypatch.setenv("VLLM_KV_CACHE_LAYOUT", "BLHNC")
    options = {**recipe["options"], "additional_config": {"dca": SIZES}}
    message = "in parts of 16, which divide its chunks, and cannot with other layers' pages"
    with pytest.raises(ValueError, match=message), engine(model, **options):
        pass


def test_padded_pages_are_not_split(llama: Path) -> None:
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    from vllm_dca.engine.block_size import check_pages_split

    config = settle(llama)
    config.cache_config.kv_cache_layout = "LBHNC"
    shape = {"block_size": 48, "num_kv_heads": 2, "head_size": 16, "dtype": torch.float32}
    whole = FullAttentionSpec(**shape)
    check_pages_split(whole, 16, config)
    padded = FullAttentionSpec(**shape, page_size_padded=2 * whole.page_size_bytes)
    message = (
        "with padding between pages. Choose chunk_size - local_size among the multiples of 48"
    )
    with pytest.raises(ValueError, match=message):
        check_pages_split(padded, 16, config)
