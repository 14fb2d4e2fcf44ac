"""Tiny random checkpoints, written from their real Hugging Face configs."""

import copy
from pathlib import Path
from typing import Any

import torch

WINDOW = 128
# Chunks of 64 tokens in it.
SIZES = {"chunk_size": 96, "local_size": 32}
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
    "LongRoPE": {
        "rope_type": "longrope",
        "short_factor": [1.0] * 8,
        "long_factor": [1.0, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0],
        **_ORIGINAL,
    },
}


# A tower beside the language model, for what is served without it.
VISION = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "out_hidden_size": SHAPE["hidden_size"],
    "deepstack_visual_indexes": [0],
    "fullatt_block_indexes": [0],
}
# No text has them.
VISION_TOKENS = {
    f"{name}_token_id": VOCAB + index
    for index, name in enumerate(("image", "video", "vision_start", "vision_end"))
}


def config(config_class: str, **changes: Any) -> Any:
    """A config of a class of transformers, SHAPE (and MOE) changed as given.

    Of a model with a tower, the text's part is changed.
    """
    import transformers

    base = {**SHAPE, **MOE} if "Moe" in config_class else SHAPE
    if config_class in ("Qwen2MoeConfig", "Qwen3_5MoeConfig", "Qwen3_5MoeTextConfig"):
        base = {**base, "shared_expert_intermediate_size": 32}
    # Hugging Face's configs write into what they are given.
    base = copy.deepcopy({**base, **changes})
    made = getattr(transformers, config_class)
    for name in [name for name in base if isinstance(getattr(made, name, None), property)]:
        del base[name]  # It follows from others there.
    if "vision_config" not in made.sub_configs:
        return made(**base)
    tower = copy.deepcopy(VISION)
    names = {"architectures": base.pop("architectures", None), **VISION_TOKENS}
    return made(text_config=base, vision_config=tower, tie_word_embeddings=False, **names)


def write(directory: Path, config_class: str, seed: int = 0, **changes: Any) -> Path:
    """A whole checkpoint, weights and all."""
    import transformers

    torch.manual_seed(seed)
    made = config(config_class, **changes)
    has_tower = "vision_config" in made.sub_configs
    auto = "AutoModelForImageTextToText" if has_tower else "AutoModelForCausalLM"
    model = getattr(transformers, auto).from_config(made, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        # Trained norms weigh each entry of a head differently, which matters to rotations.
        if "norm" in name and parameter.ndim == 1:
            parameter.data += torch.rand(len(parameter)) * 0.6 - 0.3
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
