"""What kinds of model and layer are refused at start-up, in words that help."""

import functools
import re
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import checkpoints
from tests.helpers.inprocess import engine, settle

pytestmark = pytest.mark.each_minor


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


def test_diffusion_is_refused(llama: Path) -> None:
    """Under V1, the CPU's, vLLM refuses it before."""
    from vllm_dca.engine.refusals import refusals

    config = settle(llama)
    assert refusals(config) == []
    config.model_config.__dict__.pop("is_diffusion", None)
    config.model_config.hf_config.canvas_length = 16
    assert refusals(config) == ["diffusion models"]


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
def test_layers_with_extra_attention_arguments_are_refused(
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
    ("argument", "reason"),
    [
        ({"kv_sharing_target_layer_name": "other"}, "KV sharing between layers"),
        ({"alibi_slopes": [1.0]}, "ALiBi slopes"),
        ({"sliding_window": 8}, "a sliding window that only"),
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


def test_loader_that_bypasses_create_model_is_refused(llama: Path) -> None:
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


def test_a_model_that_nobody_checked_is_warned_of(tmp_path: Path, dca_log: list[str]) -> None:
    from vllm_dca.engine.support import PROVED_MODELS

    assert "helium" not in PROVED_MODELS
    settle(checkpoints.write_config(tmp_path, "HeliumConfig", "HeliumForCausalLM"))
    assert sum("helium models are not among the" in line for line in dca_log) == 1
