"""xformers imported as on a machine with a GPU, whose torch has flash-attention.

To be imported before xformers is: its flash operator is there only where torch, at that moment,
says that it has one. (xformers' own check of torch's signature then runs, on the real torch.)
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

with pytest.MonkeyPatch.context() as _patch:
    _patch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    from xformers.ops import fmha

assert fmha.flash.FwOp.is_available(), "xformers was imported before this"


class WithoutCuda(TorchFunctionMode):
    """What looks for CUDA itself before it calls an operator: `tensor[...]` and `copy_`."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.Tensor.copy_:
            target, source = args
            assert target.shape == source.shape
            return target
        if func is not torch.Tensor.__getitem__:
            return func(*args, **(kwargs or {}))
        tensor, index = args
        index = index if isinstance(index, tuple) else (index,)
        if all(isinstance(at, torch.Tensor) for at in index):
            return torch.ops.aten.index(tensor, list(index))
        dim = 0
        for at in index:
            if at is None:
                tensor = tensor.unsqueeze(dim)
            elif isinstance(at, int):
                tensor = tensor.select(dim, at)
                continue
            elif isinstance(at, slice) and at != slice(None):
                tensor = torch.ops.aten.slice(tensor, dim, at.start, at.stop)
            dim += 1
        return tensor


@contextlib.contextmanager
def card(capability: tuple[int, int], library: bool = True) -> Iterator[None]:
    """Tensors on "cuda" have shapes and no numbers; `library` says whether xformers' loaded."""
    with pytest.MonkeyPatch.context() as patch, FakeTensorMode(), WithoutCuda():
        patch.setattr(torch.version, "cuda", "13.0")
        patch.setattr(torch.cuda, "get_device_capability", lambda *device: capability)
        patch.setattr(fmha.common, "_built_with_cuda", library)
        # Pinned memory needs a driver.
        patch.setattr(
            fmha.attn_bias,
            "_to_device_tensor",
            lambda numbers, dtype, device: torch.tensor(numbers, dtype=dtype, device=device),
        )
        yield
