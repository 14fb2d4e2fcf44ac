"""Whether a layer's queries and keys turn with their positions as its rotary table says.

DCA turns queries that the model has rotated already. Where a model does more to them, such as a
norm after the rotation, or rotates other entries of a head, that gives something else, as it
does where nothing was seen to rotate a layer, and something hidden does. So the layer's own
code runs on random numbers at three positions.
"""

from typing import Any

import torch
from vllm.model_executor.layers.linear import LinearBase

from vllm_dca.engine import transformers_rotary
from vllm_dca.engine.dry_run import Inputs, NotUnderstoodError, run_to_attention
from vllm_dca.method.rotary import QueryRotation, turn_queries

# Of the largest entry. Rounding in bf16 is a tenth of that, another turn ten times as much.
_TOLERANCE = 0.05


def check_rotation(
    layer_name: str,
    model: torch.nn.Module,
    rotation: QueryRotation,
    num_positions: int,
    is_rotated: bool = True,
) -> None:
    """Compare what reaches the attention at some positions; nothing without a device.

    Args:
        layer_name: of the Attention in the model.
        model: with rotary modules that DCA has replaced, before its weights are loaded.
        rotation: of the layer.
        num_positions: that its table tells apart.
        is_rotated: whether a rotary module was found; else `rotation` turns nothing.

    Raises:
        NotUnderstoodError: they differ.
    """
    parent = model.get_submodule(layer_name.rpartition(".")[0])
    if any(each.is_meta for each in parent.parameters()):
        return
    device = rotation.cos_sin.device
    positions = torch.tensor([0, 1, 5], device=device).clamp(max=num_positions - 1)
    query, key = _at(positions, parent, model, layer_name)
    turns = positions[1:]
    for name, at in (("queries", query), ("keys", key)):
        turned = turn_queries(at[:1].float(), rotation, torch.zeros_like(turns), turns)
        if not (turned - at[1:]).abs().max() <= _TOLERANCE * at.abs().max():
            if not is_rotated:
                raise NotUnderstoodError(
                    f"its {name} depend on their positions, by code that cannot be followed"
                )
            raise NotUnderstoodError(
                f"its {name} do not turn with their positions as its rotary table says; it may "
                "change them after the rotation, or rotate other entries"
            )


def _at(
    positions: torch.Tensor, parent: torch.nn.Module, model: torch.nn.Module, layer_name: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """[num_tokens, num_heads, head_size] each, of tokens that differ in nothing else."""
    attention: Any = model.get_submodule(layer_name)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        numbers = torch.rand(shape, generator=generator, device="cpu") + 0.5
        return numbers.to(positions.device, attention.dtype)

    def linear(x: torch.Tensor, size: int) -> torch.Tensor:
        return (random(size) - 1.0).expand(*x.shape[:-1], size).contiguous()

    def hidden(*shape: int) -> torch.Tensor:
        return random(shape[-1]).expand(shape).contiguous()

    around = transformers_rotary.find_rotary(model, layer_name)

    def embeddings(rotary: Any) -> Any:
        layer_type = transformers_rotary.layer_type_of(rotary, parent)
        x = random(1, len(positions), 1)
        return rotary(x, positions[None], *(() if layer_type is None else (layer_type,)))

    twins = {
        name: random(*tensor.shape).to(tensor.dtype)
        for name, tensor in parent.named_parameters()
        if tensor.is_floating_point()
        and not isinstance(parent.get_submodule(name.rpartition(".")[0]), LinearBase)
    }
    inputs = Inputs(positions, hidden, embeddings, linear, twins)
    reached = run_to_attention(parent, attention, around, inputs)
    query, key = (each.reshape(len(positions), -1, attention.head_size) for each in reached)
    return query, key
