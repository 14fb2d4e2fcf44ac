"""What rotates a layer's queries and keys: found by following the layer's own forward.

Models differ in which of their layers rotate, and only their code says so. So that code runs
with tensors that have no data, and a rotary module's table marks all that comes of it.
"""

import functools
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from vllm.model_executor.layers.attention import Attention

from vllm_dca.engine import transformers_rotary
from vllm_dca.engine.dry_run import (
    Inputs,
    NotUnderstoodError,
    run_to_attention,
    without_kernels,
)
from vllm_dca.engine.rotary_tables import TABLES

_TOKENS = 3

Marks = frozenset[torch.nn.Module | None]  # None stands for the positions themselves.


class Rotation(NamedTuple):
    """What rotates a layer.

    Attributes:
        rotary: the module with the table.
        places: the modules around the layer that hold it, and its name there.
    """

    rotary: torch.nn.Module
    places: list[tuple[torch.nn.Module, str]]


def rotation_of(layer_name: str, model: torch.nn.Module) -> Rotation | None:
    """What rotates the queries and keys of a layer; None if nothing does.

    Args:
        layer_name: of the Attention in the model.
        model: as it was built; nothing in it is changed.

    Raises:
        NotUnderstoodError: the layer's code cannot be followed, or does something else.
    """
    parent = model.get_submodule(layer_name.rpartition(".")[0])
    around = transformers_rotary.find_rotary(model, layer_name)
    query, key = _followed(parent, model.get_submodule(layer_name), around)
    if query != key:
        raise NotUnderstoodError("its queries and keys are not rotated alike")
    rotaries = [each for each in query if each is not None]
    if len(rotaries) > 1:
        names = ", ".join(type(each).__name__ for each in rotaries)
        raise NotUnderstoodError(f"it is rotated by several modules, {names}")
    if not rotaries:
        if None in query:
            raise NotUnderstoodError("positions reach its queries through no rotary module")
        return None
    places = [
        (owner, name)
        for owner in parent.modules()
        for name, child in owner.named_children()
        if child is rotaries[0]
    ]
    if not places and around is not None:
        places = [around]
    return Rotation(rotaries[0], places)


def _followed(
    parent: torch.nn.Module, attention: Attention, around: tuple[torch.nn.Module, str] | None
) -> tuple[Marks, Marks]:
    """The marks of the queries and of the keys that reach the attention."""
    following = _Following()
    # Tensors without data in place of the layer's own.
    twins = {}
    for name, tensor in (*parent.named_parameters(), *parent.named_buffers()):
        owner, _, last = name.rpartition(".")
        twins[name] = _meta(*tensor.shape, dtype=tensor.dtype)
        if last in TABLES:
            following.mark(twins[name], parent.get_submodule(owner))

    def embeddings(rotary: Any) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (1, _TOKENS, transformers_rotary.rotary_dim(rotary, parent))
        cos, sin = (_meta(*shape, dtype=attention.dtype) for _ in range(2))
        return following.mark(cos, rotary), following.mark(sin, rotary)

    inputs = Inputs(
        positions=following.mark(_meta(_TOKENS, dtype=torch.int64), None),
        hidden=functools.partial(_meta, dtype=attention.dtype),
        embeddings=embeddings,
        linear=following.linear,
        tensors=twins,
    )
    with without_kernels(parent, following.launch), following:
        query, key = run_to_attention(parent, attention, around, inputs)
    return following.of(query), following.of(key)


def _meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


class _Following(TorchDispatchMode):
    """Keeps, by storage, what left a mark on a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.marks: dict[int, Marks] = {}
        self.kept: list[torch.Tensor] = []

    def mark(self, tensor: torch.Tensor, by: torch.nn.Module | None) -> torch.Tensor:
        """The tensor, marked."""
        self._add(tensor, frozenset([by]))
        return tensor

    def _add(self, tensor: torch.Tensor, marks: Marks) -> None:
        storage = tensor.untyped_storage()._cdata
        self.marks[storage] = self.marks.get(storage, frozenset()) | marks
        self.kept.append(tensor)  # Or another storage would get its address.

    def of(self, *tensors: Any) -> Marks:
        """The marks of all tensors in these."""
        found: Marks = frozenset()
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, torch.Tensor):
                found |= self.marks.get(tensor.untyped_storage()._cdata, frozenset())
        return found

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """The function on tensors without data; what it makes or writes has its marks."""
        marks = self.of(args, kwargs)
        args, kwargs = tree_map_only(
            torch.Tensor,
            lambda each: each if each.is_meta else torch.empty_like(each, device="meta"),
            (args, kwargs or {}),
        )
        if kwargs.get("device") is not None:
            kwargs["device"] = torch.device("meta")
        schema = function._schema
        try:
            made = function(*args, **kwargs)
        except NotImplementedError:
            # A kernel that only writes into what it is given says so in its schema.
            if schema.returns:
                raise
            made = None
        written = [
            value
            for argument, value in zip(schema.arguments, args, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        for tensor in tree_leaves((made, written)):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor, marks)
        return made

    def linear(self, x: torch.Tensor, size: int) -> torch.Tensor:
        """In place of a linear layer: passes marks on, whatever its weights are."""
        made = _meta(*x.shape[:-1], size, dtype=x.dtype)
        self._add(made, self.of(x))
        return made

    def launch(self, *args: Any, **kwargs: Any) -> None:
        """In place of a kernel, which does not say what it writes and from what.

        Each tensor hangs on all; what it really does, `rotary_check` sees.
        """
        # A tensor descriptor's tensor is its base.
        given = [getattr(each, "base", each) for each in tree_leaves((args, kwargs))]
        marks = self.of(given)
        for tensor in given:
            if isinstance(tensor, torch.Tensor):
                self._add(tensor, marks)
