"""What cannot be served is refused at start-up, in words that help."""

import functools
import gc
import json
import re
import types
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from scripts.models.recipes import RECIPES
from tests.helpers import checkpoints
from tests.helpers.answers import assert_close, generate, of_prompt
from tests.helpers.checkpoints import SIZES
from tests.helpers.inprocess import engine, settle
from vllm_dca.reference.model import prompt_logprobs

pytestmark = pytest.mark.each_minor

# What vLLM asks a backend about.
BASE = {
    "head_size": 128,
    "dtype": torch.bfloat16,
    "kv_cache_dtype": "auto",
    "block_size": 16,
    **dict.fromkeys(("use_mla", "has_sink", "use_sparse", "use_mm_prefix"), False),
    "use_per_head_quant_scales": False,
    "device_capability": None,
    "attn_type": "decoder",
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.write(tmp_path_factory.mktemp("llama"), "LlamaConfig")


@pytest.mark.parametrize(
    ("sizes", "block_size", "message"),
    [
        ({"chunk_size": 64, "local_size": 64}, 16, "0 < local_size < chunk_size"),
        ({"chunk_size": -64}, 16, "chunk_size must be a positive number of tokens, not -64"),
        ({"local_size": 0}, 16, "local_size must be a positive number of tokens, not 0"),
        ({"size": 64}, 16, 'unknown under "dca": size. Known: chunk_size'),
        (SIZES, 48, "pass --block-size 2 or 4 or 8 or 16 or 32 or 64, or choose"),
        ({"chunk_size": 96, "local_size": 33}, 16, "such as 48"),
        ({}, 128, "Pass --block-size 64 or smaller"),
    ],
)
def test_unusable_sizes(
    sizes: dict[str, int], block_size: int, message: str, llama: Path
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        settle(llama, additional_config={"dca": sizes}, block_size=block_size)


def test_a_chunk_size_over_the_window_is_warned_of_and_works(
    llama: Path, dca_log: list[str]
) -> None:
    sizes = {"chunk_size": 256, "local_size": 64}
    with engine(llama, additional_config={"dca": sizes}) as llm:
        warned = "chunk_size 256 is over the model's window of 128 tokens"
        assert sum(warned in line for line in dca_log) == 1
        prompt = checkpoints.tokens(600)
        [output] = generate(llm, [prompt], prompt_logprobs=0)
    assert_close(of_prompt(output), prompt_logprobs(llama, prompt, **sizes))


@pytest.mark.parametrize("max_model_len", [64, 128, 1024, None])
def test_any_length_inside_or_past_the_window(max_model_len: int | None, llama: Path) -> None:
    config = settle(llama, max_model_len=max_model_len)
    assert config.model_config.max_model_len == (max_model_len or 128)


@pytest.mark.parametrize(
    ("config", "architecture", "changes", "message"),
    [
        ("DeepseekV2Config", "DeepseekV2ForCausalLM", {}, "multi-head latent attention (MLA)"),
        ("WhisperConfig", "WhisperForConditionalGeneration", {}, "encoder-decoder models"),
        ("BertConfig", "BertModel", {}, "encoder-only models"),
        ("MambaConfig", "MambaForCausalLM", {}, "models without attention"),
        ("OPTConfig", "OPTForCausalLM", {"word_embed_proj_dim": 64}, "learned positions"),
        ("BloomConfig", "BloomForCausalLM", {"n_head": 4}, "ALiBi"),
        (
            "MistralConfig",
            "MistralForCausalLM",
            {"sliding_window": 32},
            "mistral models of sliding-window layers only",
        ),
        (
            "Gemma3TextConfig",
            "Gemma3ForCausalLM",
            {"sliding_window": 32, "layer_types": ["sliding_attention"] * 2},
            "gemma3_text models of sliding-window layers only",
        ),
    ],
)
def test_models_that_are_refused_by_their_config(
    config: str, architecture: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model = checkpoints.write_config(tmp_path, config, architecture, **changes)
    with pytest.raises(NotImplementedError, match=re.escape(message)) as refusal:
        settle(model)
    assert "or use another attention backend" in str(refusal.value)


@pytest.mark.parametrize(
    ("config", "architecture", "changes", "message"),
    [
        (
            "LlamaConfig",
            "LlamaForCausalLM",
            {
                "rope_parameters": {
                    "rope_type": "deepseek_yarn",
                    "factor": 2.0,
                    "rope_theta": 1e4,
                    "original_max_position_embeddings": 64,
                }
            },
            "its rotary embedding is a DeepseekScalingRotaryEmbedding",
        ),
        (
            "Cohere2Config",
            "Cohere2ForCausalLM",
            {"sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"]},
            "layers.1.self_attn.attn: it has no rotary positions, nor has any other layer",
        ),
        # No list names it, and its norms after the rotation are not what a table says: of what
        # is half understood nothing is served with a warning.
        (
            "HunYuanDenseV1Config",
            "HunYuanDenseV1ForCausalLM",
            {},
            "layers.0.self_attn.attn: its queries do not turn with their positions",
        ),
        (
            "Llama4TextConfig",
            "Llama4ForCausalLM",
            {"no_rope_layers": [1, 0]},
            "layers.1.self_attn.attn: it has no rotary positions, nor has any other layer",
        ),
    ],
)
def test_models_that_are_refused_as_they_are_built(
    config: str, architecture: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model = checkpoints.write_config(tmp_path, config, architecture, **changes)
    with pytest.raises(NotImplementedError, match=message) as refusal, engine(model):
        pass
    assert str(refusal.value).endswith("Use another attention backend.")


def test_chunked_local_layers_are_refused_beside_any_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Llama 4's on a rank of a pipeline, which does not know what other ranks' layers are."""
    from vllm_dca.engine import remap

    changes = {"no_rope_layers": [1, 0]}
    model = checkpoints.write_config(
        tmp_path, "Llama4TextConfig", "Llama4ForCausalLM", **changes
    )
    monkeypatch.setattr(remap, "get_pp_group", lambda: types.SimpleNamespace(world_size=2))
    message = (
        "layer model.layers.0.self_attn.attn: it is a ChunkedLocalAttention. DCA needs layers "
        "that see the whole text or a sliding window. Use another attention backend."
    )
    with pytest.raises(NotImplementedError, match=message), engine(model):
        pass


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("attn_backend", "it attends by CPU_ATTN. DCA needs layers that see"),
        ("head_size_v", "its keys have 32 entries, its values 16. DCA needs as many"),
    ],
)
def test_layers_whose_model_gives_them_more_than_vllm_selected_are_refused(
    given: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A backend that a model names is a layer's, whatever was selected."""
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.models import llama as code
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    more = {"attn_backend": CPUAttentionBackend, "head_size_v": 16}
    monkeypatch.setattr(code, "Attention", functools.partial(Attention, **{given: more[given]}))
    model = checkpoints.write_config(tmp_path, "LlamaConfig", "LlamaForCausalLM", head_dim=32)
    message = f"layers.0.self_attn.attn: {reason}"
    with pytest.raises(NotImplementedError, match=message), engine(model, block_size=32):
        pass


def test_layers_with_an_attention_of_their_own_are_refused() -> None:
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

    from vllm_dca.engine.backend import DcaBackend
    from vllm_dca.engine.layers import layers_of

    class Indexed(torch.nn.Module, AttentionLayerBase):
        get_attn_backend = get_kv_cache_spec = None

    model = torch.nn.Sequential(torch.nn.Linear(1, 1), Indexed())
    with pytest.raises(NotImplementedError, match="layer 1: it is a Indexed"):
        layers_of(model, DcaBackend)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_cache_dtype": "fp8"}, "does not support --kv-cache-dtype fp8"),
        (
            {"additional_config": {"dca": {"prefill_provider": "flash_attn"}}},
            "'flash_attn' is not known on this device; choose from compiled, torch,",
        ),
        (
            {"kv_cache_dtype": "bfloat16"},
            # DCA's words, and those of vLLM 0.33, which comes first there.
            "--kv-cache-dtype bfloat16 with a torch.float32 model"
            '|kv_cache_dtype="bfloat16" is incompatible with dtype="float32"',
        ),
        (
            {
                "attention_backend": None,
                "attention_config": {"backend_per_kind": {"full_attention": "DCA"}},
            },
            "backend_per_kind",
        ),
        (
            {"speculative_config": {"method": "ngram_gpu", "num_speculative_tokens": 2}},
            "speculative decoding by ngram_gpu",
        ),
        ({"decode_context_parallel_size": 2, "tensor_parallel_size": 2}, "--decode-context"),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], message: str, llama: Path) -> None:
    with (
        pytest.raises((NotImplementedError, ValueError), match=message),
        engine(llama, **options),
    ):
        pass


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
    message = r"checkpoint's KV cache in fp8\S* \(--kv-cache-dtype bfloat16 does\)"
    for given in ({}, {"kv_cache_dtype": "auto"}):
        with pytest.raises(NotImplementedError, match=message):
            settle(model, dtype="bfloat16", **given)
    message = r"--kv-cache-dtype fp8_e5m2 \(--kv-cache-dtype bfloat16 does\)"
    with pytest.raises(NotImplementedError, match=message):
        settle(model, dtype="bfloat16", kv_cache_dtype="fp8_e5m2")
    settle(model, dtype="bfloat16", kv_cache_dtype="bfloat16")


@pytest.mark.skipif(torch.cuda.is_available(), reason="served there")
def test_the_model_s_dtype_goes_before_the_checkpoint_s_cache(tmp_path: Path) -> None:
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
    of_half = "the checkpoint's KV cache in nvfp4 (--kv-cache-dtype bfloat16 does)"
    of_full = of_half.replace("(--kv", "(--dtype bfloat16 --kv")
    assert refusals(config) == [of_full]
    config.model_config.dtype = torch.bfloat16
    assert refusals(config) == [of_half]


def test_where_soft_caps_are_refused(tmp_path: Path) -> None:
    changes = {"layer_types": ["full_attention"] * 2, "sliding_window": None}
    model = checkpoints.write(tmp_path, "Gemma2Config", **changes)
    dca = {"chunk_size": 384, "local_size": 128, "sparse": "auto"}
    with (
        pytest.raises(NotImplementedError, match="sparse prefill knows no soft cap and no"),
        engine(model, additional_config={"dca": dca}, max_num_batched_tokens=256),
    ):
        pass


def test_what_only_gpus_have_is_refused(llama: Path) -> None:
    """On the CPU vLLM switches it off, or refuses it, by itself."""
    from vllm_dca.engine.refusals import refusals

    config = settle(llama)
    assert refusals(config) == []
    config.parallel_config.enable_dbo = True
    config.parallel_config.prefill_context_parallel_size = 2
    [context, overlap] = refusals(config)
    assert context.startswith("--prefill-context-parallel-size")
    assert overlap == "--enable-dbo"


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
    words = f"parallel drafting by {method} (drafting one after the other does)"
    assert refused_of_a_drafter(llama, method=method, parallel_drafting=True) == [words]
    draft = {"method": "draft_model", "model": str(llama), "num_speculative_tokens": 2}
    with pytest.raises(NotImplementedError, match="parallel drafting by draft_model"):
        settle(llama, speculative_config={**draft, "parallel_drafting": True})


def test_the_block_size_is_the_one_that_the_engine_will_have(llama: Path) -> None:
    """vLLM 0.33 has another in its config until the model is loaded."""
    sizes = {"chunk_size": 96, "local_size": 16}
    with pytest.raises(ValueError, match=r"80 is not one of 128: pass --block-size 2 or 4 or"):
        settle(llama, additional_config={"dca": sizes}, block_size=None)
    sizes = {"chunk_size": 144, "local_size": 16}
    options = {"block_size": None, "additional_config": {"dca": sizes}}
    with engine(llama, **options, num_gpu_blocks_override=None) as llm:
        assert llm.llm_engine.vllm_config.cache_config.block_size == 128


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


def test_other_platforms_are_refused(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_dca.engine import refusals

    no = {"is_cpu": lambda: False, "is_cuda": lambda: False}
    platform = types.SimpleNamespace(device_name="tpu", **no)
    monkeypatch.setattr(refusals, "current_platform", platform)
    with pytest.raises(NotImplementedError, match="the tpu platform"):
        settle(llama)


def test_a_model_that_nobody_checked_is_warned_of(tmp_path: Path, dca_log: list[str]) -> None:
    from vllm_dca.engine.support import PROVED_MODELS

    assert "helium" not in PROVED_MODELS
    settle(checkpoints.write_config(tmp_path, "HeliumConfig", "HeliumForCausalLM"))
    assert sum("helium models are not among the" in line for line in dca_log) == 1


def test_a_shared_store_of_keys_is_warned_of(llama: Path, dca_log: list[str]) -> None:
    """A store's names do not tell the chunk sizes, so people must."""
    from vllm.config import KVTransferConfig

    options = {"additional_config": {"dca": SIZES}}
    settle(llama, **options)
    assert not any("rotated" in line for line in dca_log)
    settle(
        llama,
        **options,
        kv_transfer_config=KVTransferConfig("ExampleConnector", kv_role="kv_both"),
    )
    settle(llama, **options, kv_offloading_size=1.0)
    [shared, offloaded] = [line for line in dca_log if "as DCA rotated them" in line]
    assert shared.startswith("DCA: ExampleConnector stores keys")
    assert offloaded.startswith("DCA: OffloadingConnector stores keys")
    sizes = "chunk_size 96, local_size 32 and original_max_position_embeddings null"
    assert sizes in shared
    assert sizes in offloaded


def test_a_loader_that_bypasses_the_installation_is_refused(llama: Path) -> None:
    """As tensorizer does: it builds models without BaseModelLoader.create_model."""
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
    from vllm.model_executor.model_loader.utils import initialize_model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            DefaultModelLoader,
            "create_model",
            lambda self, vllm_config, model_config, prefix="": initialize_model(
                vllm_config=vllm_config, model_config=model_config, prefix=prefix
            ),
        )
        with pytest.raises(RuntimeError, match="DCA was not installed"), engine(llama):
            pass


def test_only_the_layers_of_dca_get_a_periodic_table(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.model_executor.layers.rotary_embedding import _ROPE_DICT, RotaryEmbedding

    from vllm_dca.engine import rotary_tables

    originals: list[tuple[weakref.ref[Any], torch.Tensor]] = []
    remap_one = rotary_tables.remap

    def spy(rotary: RotaryEmbedding, *rest: Any) -> Any:
        originals.append((weakref.ref(rotary), rotary.cos_sin_cache.clone()))
        return remap_one(rotary, *rest)

    def tables(model: torch.nn.Module) -> list[tuple[int, torch.Tensor, bool]]:
        modules = [layer.self_attn.rotary_emb for layer in model.model.layers]
        return [(id(m), m.cos_sin_cache, m._forward_method.__self__ is m) for m in modules]

    monkeypatch.setattr(rotary_tables, "remap", spy)
    _ROPE_DICT.clear()
    gc.collect()
    others = [each for each in gc.get_objects() if type(each) is RotaryEmbedding]
    with engine(llama, additional_config={"dca": SIZES}) as llm:
        [found] = llm.apply_model(tables)
        [(shared, original)] = originals
        gc.collect()
        # The original has gone, and the only table is the periodic one.
        assert shared() is None
        live = [each for each in gc.get_objects() if type(each) is RotaryEmbedding]
        known = {id(each) for each in others}
        assert {id(each) for each in live} - known == {module for module, _, _ in found}
        del live
    assert original.shape[0] == checkpoints.WINDOW
    assert len(found) == 2
    assert len({module for module, _, _ in found}) == 1
    for _, table, bound_to_itself in found:
        # A copy bound to the original would silently go on using the original's table.
        assert bound_to_itself
        assert torch.equal(table, original[torch.arange(1024) % 64])


def test_a_rotary_module_goes_when_nobody_uses_it(llama: Path) -> None:
    """Layers that keep it keep it, and a model that comes later gets one like it."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding import _ROPE_DICT, get_rope

    from vllm_dca.engine.following import Rotation
    from vllm_dca.engine.remap import _Tables
    from vllm_dca.engine.settings import settings_of

    config = settle(llama, additional_config={"dca": SIZES}, max_model_len=1024)
    _ROPE_DICT.clear()
    with set_current_vllm_config(config):
        rotary = get_rope(16, 128)
        model = torch.nn.ModuleList([torch.nn.Identity(), rotary])
        tables = _Tables(settings_of(config), 1024)
        tables.remap("first", Rotation(rotary, [(model, "0")]), model)
        tables.forget_replaced(model)
        assert get_rope(16, 128) is rotary
        tables.remap("second", Rotation(rotary, [(model, "1")]), model)
        assert model[1] is model[0]
        tables.forget_replaced(model)
        assert not _ROPE_DICT
        again = get_rope(16, 128)
        assert again is not rotary
        assert torch.equal(again.cos_sin_cache, rotary.cos_sin_cache)
        # One that is long enough stays where it is.
        model.append(torch.nn.Identity())
        tables.lengthen("third", Rotation(get_rope(16, 1024), [(model, "2")]), model)
        assert model[2] is get_rope(16, 1024)
        tables.forget_replaced(model)
        assert len(_ROPE_DICT) == 2


@pytest.mark.parametrize(
    ("use", "reason"),
    [
        ("use_batch_invariant", "batch invariance not supported"),
        ("use_dcp", "DCP not supported"),
        ("use_pcp", "PCP not supported"),
        (
            "use_mm_prefix",
            "partial multimodal token full attention not supported",
        ),
    ],
)
def test_what_vllm_is_told_that_dca_cannot(use: str, reason: str) -> None:
    from vllm_dca.engine.backend import DcaBackend

    assert DcaBackend.validate_configuration(**BASE) == []
    assert DcaBackend.validate_configuration(**{**BASE, use: True}) == [reason]


def test_a_cache_that_dca_does_not_know_is_vllm_s_to_refuse() -> None:
    from vllm_dca.engine.backend import DcaBackend

    reasons = DcaBackend.validate_configuration(**{**BASE, "kv_cache_dtype": "nvfp4"})
    assert reasons == ["kv_cache_dtype not supported"]


@pytest.mark.parametrize(
    ("capability", "dtype", "head_size", "reason"),
    [
        ((7, 5), torch.float16, 128, "7.5: below 8.0 Triton.*without tensor cores; a card of"),
        ((8, 9), torch.float32, 512, None),
        ((9, 0), torch.bfloat16, 320, None),
    ],
)
def test_cards_that_are_refused(
    capability: tuple[int, int], dtype: torch.dtype, head_size: int, reason: str | None
) -> None:
    from vllm.platforms.interface import DeviceCapability

    from vllm_dca.engine.backend import DcaBackend

    found = DcaBackend.supports_combination(
        head_size, dtype, "auto", 16, False, False, False, False, DeviceCapability(*capability)
    )
    if reason is None:
        assert found is None
    else:
        assert re.search(reason, found)


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


@pytest.mark.parametrize(
    ("argument", "reason"),
    [
        ({"kv_sharing_target_layer_name": "other"}, "KV sharing between layers"),
        ({"alibi_slopes": [1.0]}, "ALiBi slopes"),
        ({"sliding_window": 8}, "sliding-window attention"),
        ({"attn_type": "encoder_decoder"}, "encoder_decoder attention"),
        ({"attention_chunk_size": 8}, "chunked-local attention"),
        ({"chunk_lookback": 1}, "attention to a chunk and some before it"),
        ({"unheard_of": 8}, "the attention argument 'unheard_of'"),
    ],
)
def test_layers_that_are_refused(argument: dict[str, Any], reason: str) -> None:
    from vllm_dca.engine.backend import DcaImpl

    DcaImpl(4, 16, 1.0)
    with pytest.raises(NotImplementedError, match=reason):
        DcaImpl(4, 16, 1.0, **argument)
