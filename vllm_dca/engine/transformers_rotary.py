"""Position remap for models that vLLM runs by transformers' own code.

There one rotary module of the model, not a table beside each attention, makes cosines and sines
from the positions; a period in the positions is the same remap.
"""

import sys
from typing import Any

import torch

from vllm_dca.method.rotary import QueryRotation

# Their frequencies are constants of the model; dynamic NTK's are, at positions in the window.
_ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")


class PeriodicRotary(torch.nn.Module):
    """A rotary module of transformers whose positions repeat after a chunk.

    Attributes:
        rotary: the module.
        chunk_len: s, the period.
    """

    def __init__(self, rotary: torch.nn.Module, chunk_len: int) -> None:
        super().__init__()
        self.rotary = rotary
        self.chunk_len = chunk_len

    def forward(
        self, x: torch.Tensor, position_ids: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """Cosines and sines of the offsets in the chunks, as the module itself gives them."""
        return self.rotary(x, position_ids % self.chunk_len, *args, **kwargs)


def find_rotary(model: torch.nn.Module, layer_name: str) -> tuple[torch.nn.Module, str] | None:
    """The module around a layer that holds a rotary module of transformers, and its name there.

    The nearest one counts; None if there is none.
    """
    around = layer_name
    while around:
        around = around.rpartition(".")[0]
        owner = model.get_submodule(around)
        for name, child in owner.named_children():
            if isinstance(child, PeriodicRotary) or hasattr(child, "inv_freq"):
                return owner, name
    return None


def remap(rotary: Any, chunk_size: int, chunk_len: int) -> tuple[PeriodicRotary, QueryRotation]:
    """The module with a period, and how queries that it rotated are turned further.

    Raises:
        ValueError: its positions cannot be remapped; completes "it cannot, because".
    """
    rope_type = getattr(rotary, "rope_type", None)
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
    angle = torch.arange(chunk_size + 1)[:, None] * rotary.inv_freq.double()
    cos_sin = torch.cat([angle.cos(), angle.sin()], dim=-1).float()
    return PeriodicRotary(rotary, chunk_len), QueryRotation(cos_sin, is_neox)
