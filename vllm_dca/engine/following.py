"""What rotates a layer's queries and keys: found by following the layer's own forward.

Models differ in which of their layers rotate, and only their code says so. So that code runs
with tensors that have no data, and a rotary module's table marks all that comes of it.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import LinearBase

from vllm_dca.engine import transformers_rotary
from vllm_dca.engine.without_kernels import without_kernels

# Tables from which a module takes cosines and sines, by their names in vLLM.
TABLES = ("cos_sin_cache", "long_short_cos_sin_cache")
# A layer's arguments, by the names that vLLM's models have for them.
_POSITIONS = ("positions", "position_ids")
_HIDDEN = ("hidden_states", "x", "output", "hidden", "residual")
_TOKENS = 3


class NotUnderstoodError(Exception):
    """A layer could not be followed. The message completes "it cannot, because"."""


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
    try:
        positions = following.mark(_meta(_TOKENS, dtype=torch.int64), None)
        hidden = functools.partial(_meta, dtype=attention.dtype)

        def embeddings(rotary: Any) -> tuple[torch.Tensor, torch.Tensor]:
            shape = (1, _TOKENS, transformers_rotary.rotary_dim(rotary, parent))
            cos, sin = (_meta(*shape, dtype=attention.dtype) for _ in range(2))
            return following.mark(cos, rotary), following.mark(sin, rotary)

        arguments = arguments_of(parent, around, positions, hidden, embeddings)
        with following.watching(parent, attention), torch.inference_mode(), following:
            torch.func.functional_call(parent, twins, (), arguments, strict=False)
    except ReachedError:
        assert following.reached is not None
        return following.reached
    except NotUnderstoodError:
        raise
    except Exception as error:
        raise NotUnderstoodError(
            f"the code of its {type(parent).__name__} could not be followed "
            f"({type(error).__name__}: {error})"
        ) from error
    raise NotUnderstoodError(f"its {type(parent).__name__} never calls it")


def _meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def arguments_of(
    parent: torch.nn.Module,
    around: tuple[torch.nn.Module, str] | None,
    positions: torch.Tensor,
    hidden: Callable[..., torch.Tensor],
    embeddings: Callable[[Any], Any],
) -> dict[str, Any]:
    """What the forward around an attention takes, by the names of its parameters.

    Args:
        parent: the module.
        around: where the rotary module of transformers is that serves it.
        positions: [num_tokens].
        hidden: makes hidden states of a shape.
        embeddings: makes cosines and sines of the positions by transformers' rotary module.

    Raises:
        NotUnderstoodError: it takes something else.
    """
    linear = [each for each in parent.modules() if isinstance(each, LinearBase)]
    if not linear:
        raise NotUnderstoodError(f"its {type(parent).__name__} projects nothing")
    # Transformers' layers have a batch's axis.
    positions = positions if around is None else positions[None]
    arguments: dict[str, Any] = {}
    for name, parameter in inspect.signature(parent.forward).parameters.items():
        if name in _POSITIONS:
            arguments[name] = positions
        elif name in _HIDDEN:
            arguments[name] = hidden(*positions.shape, linear[0].input_size)
        elif name == "position_embeddings" and around is not None:
            arguments[name] = embeddings(getattr(*around))
        elif name == "attention_mask":
            arguments[name] = None
        elif parameter.default is parameter.empty and parameter.kind not in (
            parameter.VAR_POSITIONAL,
            parameter.VAR_KEYWORD,
        ):
            raise NotUnderstoodError(f"its {type(parent).__name__} takes a {name}")
    return arguments


class ReachedError(BaseException):
    """The attention is called, and what comes after does not matter."""


class _Following(TorchDispatchMode):
    """Keeps, by storage, what left a mark on a tensor.

    Attributes:
        reached: the marks of the queries and the keys, once the attention was called.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reached: tuple[Marks, Marks] | None = None
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

    def _of(self, *tensors: Any) -> Marks:
        found: Marks = frozenset()
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, torch.Tensor):
                found |= self.marks.get(tensor.untyped_storage()._cdata, frozenset())
        return found

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """The function on tensors without data; what it makes or writes has its marks."""
        marks = self._of(args, kwargs)
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

    @contextlib.contextmanager
    def watching(self, parent: torch.nn.Module, attention: Attention) -> Iterator[None]:
        """Linear layers pass marks on, whatever their weights are; the attention is the end."""

        def linear(x: torch.Tensor, size: int) -> torch.Tensor:
            made = _meta(*x.shape[:-1], size, dtype=x.dtype)
            self._add(made, self._of(x))
            return made

        def reached(query: torch.Tensor, key: torch.Tensor) -> None:
            self.reached = self._of(query), self._of(key)

        def launch(*args: Any, **kwargs: Any) -> None:
            # A kernel does not say what it writes and from what: each tensor hangs on all.
            # What it really does, `turning` sees. A tensor descriptor's tensor is its base.
            given = [getattr(each, "base", each) for each in tree_leaves((args, kwargs))]
            marks = self._of(given)
            for tensor in given:
                if isinstance(tensor, torch.Tensor):
                    self._add(tensor, marks)

        with standing_in(parent, attention, linear, reached), without_kernels(parent, launch):
            yield


@contextlib.contextmanager
def standing_in(
    parent: torch.nn.Module,
    attention: Attention,
    linear: Callable[[torch.Tensor, int], torch.Tensor],
    reached: Callable[[torch.Tensor, torch.Tensor], None],
) -> Iterator[None]:
    """Others in place of what a module's forward calls, before weights are there.

    Args:
        parent: the module.
        attention: what is in it, and ends the forward.
        linear: what stands in for linear layers, given the input and the output's size.
        reached: told the queries and keys.
    """
    parameters = inspect.signature(attention.forward)

    def end(*args: Any, **kwargs: Any) -> None:
        given = parameters.bind(*args, **kwargs).arguments
        reached(given["query"], given["key"])
        raise ReachedError

    def project(module: Any, x: torch.Tensor) -> Any:
        size = getattr(module, "output_size_per_partition", module.output_size)
        if getattr(module, "gather_output", False):
            size = module.output_size
        made = linear(x, size)
        return (made, None) if module.return_bias else made

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(attention, "forward", end))
        for module in parent.modules():
            if isinstance(module, LinearBase):
                forward = functools.partial(project, module)
                stack.enter_context(mock.patch.object(module, "forward", forward))
        yield
