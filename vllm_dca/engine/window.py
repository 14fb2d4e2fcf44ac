"""The trained window: how long a text a model takes without DCA."""

import copy
from typing import Any

from vllm.config import ModelConfig
from vllm.transformers_utils.config import (
    get_config,
    get_hf_text_config,
    iter_rope_parameters,
)

from vllm_dca.engine.model_facts import rope_types


def default_length(model_config: ModelConfig) -> int:
    """Tokens of the longest request, where neither DCA nor --max-model-len extends it."""
    length: int = _limited(model_config)[0].get_and_verify_max_len(None)
    return length


def own_window(model_config: ModelConfig, max_model_len: int) -> int:
    """Tokens of the longest request that vLLM serves without DCA.

    Dynamic NTK's extension does not count: its rotary table has no rows there. LongRoPE's
    window is that of the factors that vLLM chooses by the longest request.

    Args:
        model_config: of a model, or of a drafter.
        max_model_len: tokens of the longest request.
    """
    limited, limits = _limited(model_config)
    window: int = limited.get_and_verify_max_len(None)
    config = model_config.hf_text_config
    if "dynamic" in rope_types(model_config):
        window = min(window, config.max_position_embeddings, *limits)
    for rope in iter_rope_parameters(config):
        if rope["rope_type"] == "longrope":
            short = rope["original_max_position_embeddings"]
            longest = short if max_model_len <= short else config.max_position_embeddings
            window = min([longest, *limits])
    return window


def eagle_window(draft: ModelConfig, max_model_len: int) -> int:
    """As `own_window`, of an EAGLE head: into its config vLLM writes the model's length."""
    window = own_window(draft, max_model_len)
    return min(window, getattr(_as_read(draft), "max_position_embeddings", window))


def _limited(model_config: ModelConfig) -> tuple[ModelConfig, list[int]]:
    """The config from which vLLM derives max_model_len, and the limits on it.

    The one limit there may be is a sliding window that is switched off: the model serves no
    more than such a layer was trained on. vLLM has dropped that value from its config by now.
    """
    if not model_config.disable_sliding_window or not (own := _sliding_window(model_config)):
        return model_config, []
    limited = copy.copy(model_config)
    limited.hf_text_config = copy.copy(model_config.hf_text_config)
    limited.hf_text_config.sliding_window = own
    return limited, [own]


def _sliding_window(model_config: ModelConfig) -> int | None:
    """In tokens, before vLLM switched it off; checkpoints have 0 for none, too."""
    return getattr(_as_read(model_config), "sliding_window", None) or None


def _as_read(model_config: ModelConfig) -> Any:
    """The text's config, overrides and all, before vLLM wrote into it."""
    given = model_config.hf_overrides
    nested, flat = {}, given
    if not callable(given):
        # As vLLM tells them apart.
        nested = {key: value for key, value in given.items() if isinstance(value, dict)}
        flat = {key: value for key, value in given.items() if key not in nested}
    config = get_config(
        model_config.hf_config_path or model_config.model,
        model_config.trust_remote_code,
        model_config._hf_config_revision or model_config.revision,
        model_config.code_revision,
        model_config.config_format,
        **{"hf_overrides_fn" if callable(given) else "hf_overrides_kw": flat},
        token=model_config.hf_token,
    )
    model_config._apply_dict_overrides(config, nested)
    return get_hf_text_config(config)
