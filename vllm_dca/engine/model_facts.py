"""What a model's config says of its layers, before any is built."""

from vllm.config import ModelConfig
from vllm.transformers_utils.config import iter_rope_parameters


def layer_types(model: ModelConfig) -> list[str]:
    """Hugging Face's name for the kind of each layer; empty if the config has none."""
    return getattr(model.hf_text_config, "layer_types", None) or []


def has_sliding_layers(model: ModelConfig) -> bool:
    """Whether some layers see a window only."""
    kinds = layer_types(model)
    slides = model.get_sliding_window() is not None
    return slides and (not kinds or "sliding_attention" in kinds)


def rope_types(model: ModelConfig) -> list[str]:
    """Hugging Face's rope_type of each kind of layer; empty without rotary positions."""
    return [rope["rope_type"] for rope in iter_rope_parameters(model.hf_text_config)]
