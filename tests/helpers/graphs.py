"""A stand-in for CUDA graphs: what was launched at capture is launched again, as it was.

A graph keeps kernels and their arguments: addresses of tensors, and numbers by value. So does
this one, of torch's operations and Triton's launches on the CPU: what a step works out on the
host is frozen, and what lies in memory is read anew. What a graph allocates is NaN when it is
replayed, until something writes it. What would make a device wait is an error at capture.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from triton.runtime import interpreter

# Torch's operations that read something back.
WAITING = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "unique")
_recorder: "_Recorder | None" = None


class Graph:
    """In place of torch.cuda.CUDAGraph.

    Attributes:
        replays: of all graphs in this process.
        work: what is run at replay, in order.
    """

    replays = 0

    def __init__(self, **_: Any) -> None:
        self.work: list[Callable[[], None]] = []

    def capture_begin(self, **_: Any) -> None:
        global _recorder
        assert _recorder is None, "one capture at a time"
        _recorder = _Recorder(self.work)
        _recorder.__enter__()

    def capture_end(self) -> None:
        global _recorder
        assert _recorder is not None
        _recorder.__exit__(None, None, None)
        _recorder = None

    def replay(self) -> None:
        Graph.replays += 1
        with torch.inference_mode():
            for each in self.work:
                each()


@contextlib.contextmanager
def graph(into: Graph, *_: Any, **__: Any) -> Iterator[None]:
    """In place of torch.cuda.graph."""
    into.capture_begin()
    try:
        yield
    finally:
        into.capture_end()


class _Recorder(TorchDispatchMode):
    """Runs torch's operations, and keeps them."""

    def __init__(self, work: list[Callable[[], None]]) -> None:
        super().__init__()
        self.work = work

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        namespace, _, name = func.name().partition("::")
        name = name.partition(".")[0]
        assert name not in WAITING, f"{name} waits for the device"
        assert namespace != "vllm", f"{name} is Python's: a graph keeps what it launches"
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given = {_storage(each) for each in _tensors((args, kwargs))}
        made = [_storage(each) not in given for each in _tensors(result)]
        if "empty" in name:
            self.work += [functools.partial(_poison, each) for each in _tensors(result)]
        elif any(made) or func._schema.is_mutable:
            self.work.append(functools.partial(_again, func, args, kwargs, result, made))
        return result


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _poison(tensor: torch.Tensor) -> None:
    if tensor.is_floating_point():
        tensor.fill_(torch.nan)


def _again(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any, made: list[bool]
) -> None:
    """Into the memory that the operation's results had at capture."""
    found = _tensors(func(*args, **kwargs))
    for old, new, own in zip(_tensors(result), found, made, strict=True):
        if own:
            old.copy_(new)


def as_kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that a graph keeps as one launch: what it does inside is a device's."""

    @functools.wraps(function)
    def launch(*args: Any, **kwargs: Any) -> Any:
        if _recorder is None:
            return function(*args, **kwargs)
        with _disable_current_modes():
            function(*args, **kwargs)
        _recorder.work.append(functools.partial(function, *args, **kwargs))

    return launch


@contextlib.contextmanager
def stand_in() -> Iterator[None]:
    """Torch's graphs are these for a while; Triton's launches are kept."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "CUDAGraph", Graph)
        patch.setattr(torch.cuda, "graph", graph)
        run = as_kernel(interpreter.InterpretedFunction.run)
        patch.setattr(interpreter.InterpretedFunction, "run", run)
        yield
