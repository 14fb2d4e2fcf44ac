"""Position remap for models that vLLM runs by transformers' own code.

There one rotary module of the model, not a table beside each attention, makes cosines and sines
from the positions; a period in the positions is the same remap.
"""

import sys
from typing import Any

import torch

from vllm_dca.engine.rotary_tables import has_table
from vllm_dca.method.rotary import QueryRotation

# Their frequencies are constants of the model; dynamic NTK's are, at positions in the window.
_ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")


class PeriodicRotary(torch.nn.Module):
    """A rotary module of transformers whose positions repeat after a chunk.

    Attributes:
        rotary: the module.
        chunk_len: s, the period.
        layer_types: the kinds of layers whose positions repeat; None for a module that does not
            tell kinds apart.
    """

    def __init__(
        self, rotary: torch.nn.Module, chunk_len: int, layer_type: str | None = None
    ) -> None:
        super().__init__()
        self.rotary = rotary
        self.chunk_len = chunk_len
        self.layer_types = {layer_type}

    def forward(
        self,
        x: torch.Tensor,
        position_ids: torch.Tensor,
        layer_type: str | None = None,
    ) -> Any:
        """Cosines and sines of the offsets in the chunks, as the module itself gives them."""
        if layer_type in self.layer_types:
            position_ids = position_ids % self.chunk_len
        if layer_type is None:
            return self.rotary(x, position_ids)
        return self.rotary(x, position_ids, layer_type)


def find_rotary(model: torch.nn.Module, layer_name: str) -> tuple[torch.nn.Module, str] | None:
    """The module around a layer that holds a rotary module of transformers, and its name there.

    The nearest one counts; None if there is none.
    """
    around = layer_name
    while around:
        around = around.rpartition(".")[0]
        owner = model.get_submodule(around)
        for name, child in owner.named_children():
            if isinstance(child, PeriodicRotary) or _has_frequencies(child):
                return owner, name
    return None


def _has_frequencies(module: torch.nn.Module) -> bool:
    # vLLM's own have a table, and may have frequencies too.
    names = [name for name, _ in module.named_buffers(recurse=False)]
    return any(name.endswith("inv_freq") for name in names) and not has_table(module)


def layer_type_of(rotary: Any, attention: torch.nn.Module) -> str | None:
    """The type of layer that an attention module of transformers asks its rotary module for."""
    rotary = rotary.rotary if isinstance(rotary, PeriodicRotary) else rotary
    if not isinstance(rotary.rope_type, dict):
        return None
    index: Any = attention.layer_idx
    return str(rotary.config.layer_types[index])


def _prefix(layer_type: str | None) -> str:
    return "" if layer_type is None else f"{layer_type}_"


def rotary_dim(rotary: Any, attention: torch.nn.Module) -> int:
    """Entries of a head that are rotated in an attention module of transformers."""
    rotary = rotary.rotary if isinstance(rotary, PeriodicRotary) else rotary
    prefix = _prefix(layer_type_of(rotary, attention))
    return 2 * len(getattr(rotary, f"{prefix}inv_freq"))


def periodic(
    rotary: Any, chunk_size: int, chunk_len: int, layer_type: str | None
) -> tuple[PeriodicRotary, QueryRotation]:
    """The module with a period, and how queries that it rotated are turned further.

    Raises:
        ValueError: its positions cannot be remapped; completes "it cannot, because".
    """
    kinds = getattr(rotary, "rope_type", None)
    rope_type = kinds if layer_type is None or kinds is None else kinds[layer_type]
    if rope_type not in _ROPE_TYPES:
        raise ValueError(
            f"its {type(rotary).__name__} is of type {rope_type}, not {', '.join(_ROPE_TYPES)}"
        )
    modeling = sys.modules[type(rotary).__module__]
    if not hasattr(modeling, "rotate_half"):
        raise ValueError(f"{modeling.__name__} does not say which entries it rotates together")
    # Which entries make a pair: asked of the model's own code.
    pairs = modeling.rotate_half(torch.arange(4.0, device="cpu"))
    is_neox = pairs.tolist() == [-2.0, -3.0, 0.0, 1.0]
    inv_freq = getattr(rotary, f"{_prefix(layer_type)}inv_freq")
    angle = torch.arange(chunk_size + 1)[:, None] * inv_freq.double()
    cos_sin = torch.cat([angle.cos(), angle.sin()], dim=-1).float()
    return PeriodicRotary(rotary, chunk_len, layer_type), QueryRotation(cos_sin, is_neox)
