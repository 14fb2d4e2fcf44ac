"""As much of a GPU as its tests ask torch for, on a machine without one.

Graphs keep launches and replay them, and reading back is an error when it shall be.
The kernels run in Triton's interpreter.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers import graphs


class _Synchronising(TorchDispatchMode):
    """In place of torch's own error."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.name().removeprefix("aten::").split(".")[0] in graphs.WAITING:
            raise RuntimeError(f"called a synchronizing CUDA operation: {func.name()}")
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def simulated_gpu() -> Iterator[None]:
    modes = contextlib.ExitStack()

    def set_sync_debug_mode(mode: Any) -> None:
        if mode == "error":
            modes.enter_context(_Synchronising())
        else:
            modes.close()

    with pytest.MonkeyPatch.context() as patch, graphs.stand_in(), modes:
        patch.setattr(torch.cuda, "synchronize", lambda *device: None)
        patch.setattr(torch.cuda, "set_sync_debug_mode", set_sync_debug_mode)
        yield
