"""Which layers of a model DCA attends, and which keep their own attention."""

from typing import NamedTuple

import torch
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.v1.attention.backend import AttentionBackend

_KINDS = "layers that see the whole text or a sliding window"


class Layers(NamedTuple):
    """The attention layers of a model, by name.

    Attributes:
        attended: by DCA.
        kept: as vLLM made them; `check_kept` says which can stay so.
    """

    attended: dict[str, Attention]
    kept: dict[str, Attention]


def refusal(layer_name: str, reason: str, needed: str = "") -> NotImplementedError:
    """Why one layer stops a model: what it has, what DCA needs, what would work."""
    return NotImplementedError(
        f"--attention-backend dca cannot serve this model: layer {layer_name}: {reason}. "
        + (f"DCA needs {needed}. " if needed else "")
        + "Use another attention backend."
    )


def layers_of(model: torch.nn.Module, dca_backend: type[AttentionBackend]) -> Layers:
    """Sort a model's layers.

    Args:
        model: as it was built.
        dca_backend: of the layers that DCA attends.

    Raises:
        NotImplementedError: a layer attends in a way of its own.
    """
    layers = Layers({}, {})
    for name, each in model.named_modules():
        if not isinstance(each, AttentionLayerBase) or isinstance(each, MambaBase):
            continue
        # With an attention of its own, such as one over what an indexer chose.
        if not isinstance(each, Attention):
            raise refusal(name, f"it is a {type(each).__name__}", _KINDS)
        (layers.attended if each.attn_backend is dca_backend else layers.kept)[name] = each
    return layers


def check_kept(
    layers: Layers, vllm_config: VllmConfig, dca_backend: type[AttentionBackend]
) -> None:
    """Whether the layers that DCA leaves alone take any length as they are, and not all are.

    Args:
        layers: of the model.
        vllm_config: of the engine.
        dca_backend: of the layers that DCA attends.

    Raises:
        NotImplementedError: one sees more than a window, or none of the model's is DCA's.
    """
    for name, layer in layers.kept.items():
        if layer.sliding_window is None:
            kind, by = type(layer).__name__, layer.attn_backend.get_name()
            reason = f"it attends by {by}" if kind == "Attention" else f"it is a {kind}"
            raise refusal(name, reason, _KINDS)
    # A pipeline's rank may have none. A drafter without one shares its model's context.
    everywhere = vllm_config.compilation_config.static_forward_context.values()
    if get_pp_group().world_size == 1 and not any(
        getattr(each, "attn_backend", None) is dca_backend for each in everywhere
    ):
        raise NotImplementedError(
            "--attention-backend dca cannot serve this model: none of its layers attends to "
            "the whole text, so that DCA has nothing to do. Use another attention backend."
        )
