"""Which layers are a drafter's, by the names that vLLM gives them."""

from collections.abc import Iterable

from vllm.config import VllmConfig
from vllm.model_executor.models.utils import extract_layer_index

# How the layers of a draft model, a model of its own, are named.
DRAFT_MODEL_PREFIX = "draft_model"
_MTP_PREFIX = "mtp"


def is_drafters(layer_name: str, vllm_config: VllmConfig) -> bool:
    """Whether a layer is a drafter's, and not the model's.

    Drafters whose layers have no prefix of their own count on from the model's last layer.
    """
    if {DRAFT_MODEL_PREFIX, _MTP_PREFIX} & {*layer_name.split(".")}:
        return True
    layers = vllm_config.model_config.hf_text_config.num_hidden_layers
    return extract_layer_index(layer_name) >= layers


def reads_one_token_more(layer_names: Iterable[str], vllm_config: VllmConfig) -> bool:
    """Whether a step of these layers has a token more of each request than vLLM tells the host.

    A draft model's has: it reads the token that the model has just answered, too.
    """
    speculative = vllm_config.speculative_config
    return (
        speculative is not None
        and speculative.method == "draft_model"
        and all(name.startswith(f"{DRAFT_MODEL_PREFIX}.") for name in layer_names)
    )
