"""A layer's forward on tensors that have no data, where it has kernels for its device.

On such tensors torch runs none of its own operators. A Triton kernel is not one of these: it
would get null pointers, and the CUDA error would stay with the process.
"""

import contextlib
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from vllm.model_executor.custom_op import CustomOp


@contextlib.contextmanager
def without_kernels(parent: torch.nn.Module, launch: Callable[..., None]) -> Iterator[None]:
    """Have vLLM's modules go by their native forwards, and nothing launched by Triton.

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
        except ImportError:
            pass  # Without Triton nothing is launched.
        else:
            stack.enter_context(replaced(launch))
        yield
