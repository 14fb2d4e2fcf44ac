"""Tiny random checkpoints, written from their real Hugging Face configs."""

import copy
from pathlib import Path
from typing import Any

import torch

WINDOW = 128
VOCAB = 256

SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": WINDOW,
    "tie_word_embeddings": False,
    # Wide enough that attention is far from uniform: positions must matter to the answers.
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
MOE = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "decoder_sparse_step": 1,
    "norm_topk_prob": True,
}
# One linear-attention layer and a full one, as vLLM's kernels for CPUs take them.
QWEN3_NEXT = {
    **MOE,
    "layer_types": ["linear_attention", "full_attention"],
    "head_dim": 64,
    "partial_rotary_factor": 1.0,
    "shared_expert_intermediate_size": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "initializer_range": 0.1,
}

# Families of decoders by their config's class; what of SHAPE is changed. Gemma 3 and Qwen3-Next
# have tests of their own.
FAMILIES: dict[str, dict[str, Any]] = {
    "CohereConfig": {"tie_word_embeddings": True},  # vLLM's ties them in any case
    "GemmaConfig": {},
    "Glm4Config": {},  # half of a head, pairs interleaved
    "GraniteConfig": {},
    "LlamaConfig": {},
    "MistralConfig": {"sliding_window": None},
    "MixtralConfig": {"num_local_experts": 4, "sliding_window": None},
    "NemotronConfig": {},
    "Phi3Config": {},
    "Qwen2Config": {},
    "Qwen2MoeConfig": {},
    "Qwen3Config": {},
    "Qwen3MoeConfig": {},
    "StableLmConfig": {"partial_rotary_factor": 0.25},
    # By transformers' own code:
    "GlmConfig": {},
    "OlmoConfig": {},
    "Olmo2Config": {},
    "PhiConfig": {"partial_rotary_factor": 0.5},
    "SmolLM3Config": {"no_rope_layers": [1, 0]},
    "Starcoder2Config": {},
}
_ORIGINAL = {"rope_theta": 1e4, "original_max_position_embeddings": 32}
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
    "dynamic NTK": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
    "YaRN": {"rope_type": "yarn", "factor": 4.0, **_ORIGINAL},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        **_ORIGINAL,
    },
}


def config(config_class: str, **changes: Any) -> Any:
    """A config of a class of transformers, SHAPE (and MOE) changed as given."""
    import transformers

    base = {**SHAPE, **MOE} if "Moe" in config_class else SHAPE
    if config_class == "Qwen2MoeConfig":
        base = {**base, "shared_expert_intermediate_size": 32}
    # Hugging Face's configs write into what they are given.
    return getattr(transformers, config_class)(**copy.deepcopy({**base, **changes}))


def write(directory: Path, config_class: str, seed: int = 0, **changes: Any) -> Path:
    """A whole checkpoint, weights and all."""
    import transformers

    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(
        config(config_class, **changes), dtype=torch.float32
    )
    model.save_pretrained(directory)
    return directory


def write_tokenizer(directory: Path) -> None:
    """A token a byte, for what asks for text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={b: i for i, b in enumerate(bytes_)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(directory)


def write_config(directory: Path, config_class: str, architecture: str, **changes: Any) -> Path:
    """A checkpoint's config alone, enough for what is refused before weights are read."""
    config(config_class, architectures=[architecture], **changes).save_pretrained(directory)
    return directory


def tokens(length: int, seed: int = 0) -> list[int]:
    """Random tokens that are none of the special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (length,), generator=generator).tolist()
