"""Triton's interpreter, with the arithmetic that a GPU has.

As it comes (3.9), it

- rounds fp32 to bf16 by cutting bits off, and its matrix product takes bf16 bit patterns for
  integers: both are given torch's conversions here;
- refuses masks in which integers had a part ("mask has unsupported dtype"), as vLLM's kernels
  have them: they are made booleans;
- looks through the whole language for every function that a kernel calls, though the kernel's
  own launch did: a fifth of the time.

tests/conftest.py switches the interpreter on for the process.
"""

import contextlib
import functools
import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction

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


def _create_masked_load(self, ptrs, mask, other, *how):  # type: ignore[no-untyped-def]
    return _LOAD(self, ptrs, _booleans(mask), other, *how)


def _create_masked_store(self, ptrs, value, mask, *how):  # type: ignore[no-untyped-def]
    return _STORE(self, ptrs, value, _booleans(mask), *how)


def _booleans(mask: interpreter.TensorHandle) -> interpreter.TensorHandle:
    return interpreter.TensorHandle(mask.data.astype(np.bool_), tl.int1)


def _patch_lang(function: Any) -> Any:
    languages = [each for each in (tl, tl.core) if each in _modules(function)]
    if any(tl.core.is_builtin(language.load) for language in languages):
        return _PATCH_LANG(function)
    return interpreter._LangPatchScope()


@functools.cache
def _modules(function: Any) -> list[Any]:
    return [each for each in function.__globals__.values() if inspect.ismodule(each)]


_LOAD = interpreter.InterpreterBuilder.create_masked_load
_STORE = interpreter.InterpreterBuilder.create_masked_store
_PATCH_LANG = interpreter._patch_lang


def repair() -> None:
    """Put these in; they change nothing where there is a GPU."""
    interpreter._convert_float = _convert_float
    interpreter._patch_lang = _patch_lang
    builder = interpreter.InterpreterBuilder
    builder.create_dot = _create_dot
    builder.create_masked_load = _create_masked_load
    builder.create_masked_store = _create_masked_store


def patch_for_good() -> None:
    """Leave the language patched between launches, in a process that compiles no kernel.

    Each launch patches it for itself, and back, which takes longer than many a kernel.
    """
    repair()
    interpreter._LangPatchScope.restore = lambda scope: None


@contextlib.contextmanager
def launches() -> Iterator[Counter[tuple[Any, ...]]]:
    """Counts launches by kernel and by what a GPU's compiler specialises it for.

    On a GPU too, where kernels are compiled functions and no interpreted ones.
    """
    found: Counter[tuple[Any, ...]] = Counter()

    def counting(run: Callable[..., Any]) -> Callable[..., Any]:
        def counted(function: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
            found[_key(function, args, kwargs)] += 1
            return run(function, *args, grid=grid, warmup=warmup, **kwargs)

        return counted

    with pytest.MonkeyPatch.context() as patch:
        for kind in (interpreter.InterpretedFunction, JITFunction):
            patch.setattr(kind, "run", counting(kind.run))
        yield found


def _key(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    values = {**dict(zip(function.arg_names, args, strict=False)), **kwargs}
    if isinstance(function, JITFunction):
        exempt = function.do_not_specialize
    else:
        exempt = function.kwargs["do_not_specialize"]
    annotations = function.fn.__annotations__
    return (
        function.fn.__name__.strip("_"),
        *(
            (
                name,
                value
                if annotations.get(name) is tl.constexpr
                else _kind(value, name in (exempt or ())),
            )
            for name, value in values.items()
        ),
    )


def _kind(value: Any, exempt: bool) -> Any:
    """What Triton tells apart of an argument that is no constant of the kernel."""
    if isinstance(value, torch.Tensor):
        return value.dtype, exempt or value.data_ptr() % 16 == 0
    if isinstance(value, int):
        wide = value.bit_length() > 31
        return (int, wide) if exempt else (int, wide, value == 1, value % 16 == 0)
    return type(value)
