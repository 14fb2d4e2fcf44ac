"""The module around an attention layer, run up to that layer on inputs of our choice.

So shows what its forward does to queries and keys, before there are weights: the layer's
parameters and the results of its linear layers are given, and the attention ends the run.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
from vllm.model_executor.custom_op import CustomOp
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import LinearBase

# A layer's arguments, by the names that vLLM's models have for them.
_POSITIONS = ("positions", "position_ids")
_HIDDEN = ("hidden_states", "x", "output", "hidden", "residual")


class NotUnderstoodError(Exception):
    """What a layer does cannot be told. The message completes "it cannot, because"."""


class Inputs(NamedTuple):
    """What the forward around an attention is given.

    Attributes:
        positions: [num_tokens].
        hidden: makes hidden states of a shape.
        embeddings: makes cosines and sines of the positions by transformers' rotary module.
        linear: stands in for linear layers, given the input and the output's size.
        tensors: in place of the module's parameters and buffers, by name.
    """

    positions: torch.Tensor
    hidden: Callable[..., torch.Tensor]
    embeddings: Callable[[Any], Any]
    linear: Callable[[torch.Tensor, int], torch.Tensor]
    tensors: dict[str, torch.Tensor]


def run_to_attention(
    parent: torch.nn.Module,
    attention: Attention,
    around: tuple[torch.nn.Module, str] | None,
    inputs: Inputs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The queries and keys that reach an attention layer.

    Args:
        parent: the module around it; its forward runs, and nothing in it is changed.
        attention: the layer.
        around: where the rotary module of transformers is that serves it, if one does.
        inputs: of the forward.

    Raises:
        NotUnderstoodError: the forward takes something else, fails, or never calls the layer.
    """
    try:
        arguments = _arguments(parent, around, inputs)
        with _standing_in(parent, attention, inputs.linear), torch.inference_mode():
            torch.func.functional_call(parent, inputs.tensors, (), arguments, strict=False)
    except _ReachedError as reached:
        return reached.query, reached.key
    except NotUnderstoodError:
        raise
    except Exception as error:
        raise NotUnderstoodError(
            f"the code of its {type(parent).__name__} could not be followed "
            f"({type(error).__name__}: {error})"
        ) from error
    raise NotUnderstoodError(f"its {type(parent).__name__} never calls it")


def _arguments(
    parent: torch.nn.Module, around: tuple[torch.nn.Module, str] | None, inputs: Inputs
) -> dict[str, Any]:
    """By the names of the forward's parameters."""
    linear = [each for each in parent.modules() if isinstance(each, LinearBase)]
    if not linear:
        raise NotUnderstoodError(f"its {type(parent).__name__} projects nothing")
    # Transformers' layers have a batch's axis.
    positions = inputs.positions if around is None else inputs.positions[None]
    arguments: dict[str, Any] = {}
    for name, parameter in inspect.signature(parent.forward).parameters.items():
        if name in _POSITIONS:
            arguments[name] = positions
        elif name in _HIDDEN:
            arguments[name] = inputs.hidden(*positions.shape, linear[0].input_size)
        elif name == "position_embeddings" and around is not None:
            arguments[name] = inputs.embeddings(getattr(*around))
        elif name == "attention_mask":
            arguments[name] = None
        elif parameter.default is parameter.empty and parameter.kind not in (
            parameter.VAR_POSITIONAL,
            parameter.VAR_KEYWORD,
        ):
            raise NotUnderstoodError(f"its {type(parent).__name__} takes a {name}")
    return arguments


class _ReachedError(BaseException):
    """The attention is called; what comes after does not matter.

    No Exception, because a model may catch those.
    """

    def __init__(self, query: torch.Tensor, key: torch.Tensor) -> None:
        super().__init__()
        self.query, self.key = query, key


@contextlib.contextmanager
def _standing_in(
    parent: torch.nn.Module,
    attention: Attention,
    linear: Callable[[torch.Tensor, int], torch.Tensor],
) -> Iterator[None]:
    """Others in place of what a module's forward calls: linear layers, and the attention."""
    parameters = inspect.signature(attention.forward)

    def end(*args: Any, **kwargs: Any) -> None:
        given = parameters.bind(*args, **kwargs).arguments
        raise _ReachedError(given["query"], given["key"])

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


@contextlib.contextmanager
def without_kernels(parent: torch.nn.Module, launch: Callable[..., None]) -> Iterator[None]:
    """Have vLLM's modules go by their native forwards, and nothing launched by Triton.

    For runs on tensors without data, where torch runs none of its own operators. A Triton
    kernel is not one of these: it would get null pointers, and the CUDA error would stay with
    the process.

    Args:
        parent: whose forward runs.
        launch: called in place of a launch that is left, with the kernel's arguments.
    """
    with contextlib.ExitStack() as stack:
        for module in parent.modules():
            if isinstance(module, CustomOp):
                native = mock.patch.object(module, "_forward_method", module.forward_native)
                stack.enter_context(native)
        try:
            from vllm_dca.cuda.launches import replaced
        except ModuleNotFoundError as error:
            # Without Triton nothing is launched. What else is missing is a defect.
            if error.name != "triton":
                raise
        else:
            stack.enter_context(replaced(launch))
        yield
