"""Triton's interpreter, with the arithmetic that a GPU has.

As it comes (3.9), it rounds fp32 to bf16 by cutting bits off, and its matrix product takes bf16
bit patterns for integers. Both are given torch's conversions here. tests/conftest.py switches
the interpreter on for the process.
"""

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_TORCH = {
    tl.float32: torch.float32,
    tl.float16: torch.float16,
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
}
_BITS = {8: torch.uint8, 16: torch.uint16, 32: torch.int32}


def _to_torch(data: np.ndarray, dtype: tl.dtype) -> torch.Tensor:
    bits = torch.from_numpy(np.ascontiguousarray(data)).view(_BITS[dtype.primitive_bitwidth])
    return bits.view(_TORCH[dtype])


def _convert_float(
    data: np.ndarray, source: tl.dtype, target: tl.dtype, rounding_mode: object
) -> np.ndarray:
    converted = _to_torch(data, source.scalar).to(_TORCH[target.scalar])
    return converted.view(_BITS[target.primitive_bitwidth]).numpy()


def _create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):  # type: ignore[no-untyped-def]
    product = (
        _to_torch(a.data, a.dtype.scalar).float() @ _to_torch(b.data, b.dtype.scalar).float()
    )
    return interpreter.TensorHandle(product.numpy() + d.data, d.dtype.scalar)


def repair() -> None:
    """Put the conversions in; they change nothing where there is a GPU."""
    interpreter._convert_float = _convert_float
    interpreter.InterpreterBuilder.create_dot = _create_dot
