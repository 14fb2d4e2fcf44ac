"""Models of whose mathematics transformers has code under another name.

A checkpoint of that other model is written anew with the names that vLLM's class for this one
reads. So vLLM's class is held against code of transformers that computes the same.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch


class Renamed(NamedTuple):
    """How a checkpoint of the other model becomes one of this.

    Attributes:
        model_type: of this model's checkpoints.
        config: from the other's config.json to what this one's has more, or in place of it.
        merged: a tensor's name, and those of the other's that are its rows.
        by_head: whether rows of one KV head stand together there.
        names: parts of the other's names, and what stands in their place.
        without: ends of the other's names that this one has not; they are zero.
    """

    model_type: str
    config: Callable[[dict[str, Any]], dict[str, Any]] = lambda other: {}
    merged: tuple[str, tuple[str, ...]] = ("", ())
    by_head: bool = False
    names: tuple[tuple[str, str], ...] = ()
    without: tuple[str, ...] = ()


def _chatglm(other: dict[str, Any]) -> dict[str, Any]:
    return {
        "model_type": "chatglm",
        "num_layers": other["num_hidden_layers"],
        "padded_vocab_size": other["vocab_size"],
        "ffn_hidden_size": other["intermediate_size"],
        "kv_channels": other["head_dim"],
        "seq_length": other["max_position_embeddings"],
        "layernorm_epsilon": other["rms_norm_eps"],
        "multi_query_attention": True,
        "multi_query_group_num": other["num_key_value_heads"],
        "add_qkv_bias": other["attention_bias"],
        "original_rope": True,
    }


def _minicpm(other: dict[str, Any]) -> dict[str, Any]:
    return {
        "scale_emb": other["embedding_multiplier"],
        "scale_depth": other["residual_multiplier"] * other["num_hidden_layers"] ** 0.5,
        "dim_model_base": other["hidden_size"] / other["logits_scaling"],
    }


_QKV = ("q_proj", "k_proj", "v_proj")
_GLM = Renamed(
    "chatglm",
    _chatglm,
    merged=("query_key_value", _QKV),
    names=(
        ("model.embed_tokens", "transformer.embedding.word_embeddings"),
        ("model.layers", "transformer.encoder.layers"),
        ("model.norm", "transformer.encoder.final_layernorm"),
        ("self_attn", "self_attention"),
        ("o_proj", "dense"),
        ("gate_up_proj", "dense_h_to_4h"),
        ("down_proj", "dense_4h_to_h"),
        ("lm_head", "transformer.output_layer"),
    ),
)
RENAMED = {
    "ChatGLMForConditionalGeneration": _GLM,
    "ChatGLMModel": _GLM,
    "ExaoneForCausalLM": Renamed(
        "exaone",
        lambda other: {
            "activation_function": other["hidden_act"],
            "layer_norm_epsilon": other["rms_norm_eps"],
        },
        names=(
            ("model.embed_tokens", "transformer.wte"),
            ("model.layers", "transformer.h"),
            ("model.norm", "transformer.ln_f"),
            ("self_attn", "attn.attention"),
            ("o_proj", "out_proj"),
            ("gate_proj", "c_fc_0"),
            ("up_proj", "c_fc_1"),
            ("down_proj", "c_proj"),
            ("input_layernorm", "ln_1"),
            ("post_attention_layernorm", "ln_2"),
        ),
    ),
    "InternLM2ForCausalLM": Renamed(
        "internlm2",
        merged=("wqkv", _QKV),
        by_head=True,
        names=(
            ("embed_tokens", "tok_embeddings"),
            ("post_attention_layernorm", "ffn_norm"),
            ("input_layernorm", "attention_norm"),
            ("self_attn", "attention"),
            ("o_proj", "wo"),
            ("mlp", "feed_forward"),
            ("gate_proj", "w1"),
            ("down_proj", "w2"),
            ("up_proj", "w3"),
            ("lm_head", "output"),
        ),
    ),
    # Without layers of its drafter.
    "MiMoForCausalLM": Renamed("mimo", lambda other: {"num_nextn_predict_layers": 0}),
    "MiniCPMForCausalLM": Renamed("minicpm", _minicpm),
    "OrionForCausalLM": Renamed(
        "orion", lambda other: {"rms_norm_eps": other["layer_norm_eps"]}
    ),
    "PanguEmbeddedForCausalLM": Renamed("PanguEmbedded"),
    "Rnj1ForCausalLM": Renamed("gemma3_text"),
    "TeleChat2ForCausalLM": Renamed(
        "telechat",
        lambda other: {
            "n_layer": other["num_hidden_layers"],
            "n_head": other["num_attention_heads"],
            "ffn_hidden_size": other["intermediate_size"],
            "layer_norm_epsilon": other["rms_norm_eps"],
        },
        merged=("key_value", ("k_proj", "v_proj")),
        by_head=True,
        names=(
            ("model.embed_tokens", "transformer.word_embeddings"),
            ("model.layers", "transformer.h"),
            ("model.norm", "transformer.ln_f"),
            ("self_attn", "self_attention"),
            ("q_proj", "query"),
            ("o_proj", "dense"),
        ),
        without=("query.bias", "key_value.bias", "gate_proj.bias", "up_proj.bias"),
    ),
}


def write(directory: Path, model: Path, architecture: str) -> Path:
    """A checkpoint of this architecture with the numbers of another.

    Args:
        directory: where it is written.
        model: a checkpoint in one file, as transformers saves it.
        architecture: one of RENAMED.
    """
    import safetensors.torch

    renamed = RENAMED[architecture]
    config = json.loads((model / "config.json").read_text())
    tensors = safetensors.torch.load_file(model / "model.safetensors")
    heads = config["num_key_value_heads"] if renamed.by_head else 1
    tensors = _merged(tensors, *renamed.merged, heads)
    for old, new in renamed.names:
        tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    left_out = [name for name in tensors if name.endswith(renamed.without)]
    assert not any(tensors.pop(name).any() for name in left_out)
    directory.mkdir()
    path = directory / "model.safetensors"
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    config = {**config, "architectures": [architecture], **renamed.config(config)}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def _merged(
    tensors: dict[str, torch.Tensor], whole: str, parts: tuple[str, ...], heads: int
) -> dict[str, torch.Tensor]:
    """With the parts of each layer as one tensor, in `heads` groups of rows of each."""
    merged = dict(tensors)
    for name in [name for name in tensors if parts and f".{parts[0]}." in name]:
        rows = [
            merged.pop(name.replace(parts[0], part)).unflatten(0, (heads, -1)) for part in parts
        ]
        merged[name.replace(parts[0], whole)] = torch.cat(rows, dim=1).flatten(0, 1)
    return merged
