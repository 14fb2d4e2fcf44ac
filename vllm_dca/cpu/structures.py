"""The compiled kernel's structures, field by field as C++ has them."""

import ctypes

from vllm_dca.method.sparse_config import TILE


class Arguments(ctypes.Structure):
    """Of an attention call; see `compiled.cpp`."""

    _fields_ = (
        ("query", ctypes.c_void_p),
        ("kv_cache", ctypes.c_void_p),
        ("output", ctypes.c_void_p),
        ("cos_sin", ctypes.c_void_p),
        ("temperature", ctypes.c_void_p),
        ("sinks", ctypes.c_void_p),
        ("position", ctypes.c_void_p),
        ("request", ctypes.c_void_p),
        ("turn", ctypes.c_void_p),
        ("block_table", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("kv_heads", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("head_size", ctypes.c_int64),
        ("rotary_dim", ctypes.c_int64),
        ("is_neox", ctypes.c_int64),
        ("block_size", ctypes.c_int64),
        ("chunk_len", ctypes.c_int64),
        ("query_stride", ctypes.c_int64 * 2),
        ("output_stride", ctypes.c_int64 * 2),
        ("cache_stride", ctypes.c_int64 * 3),
        ("table_stride", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("soft_cap", ctypes.c_float),
    )


class Tokens(ctypes.Structure):
    """New keys and values to store; see `compiled.cpp`."""

    _fields_ = (
        ("key", ctypes.c_void_p),
        ("value", ctypes.c_void_p),
        ("kv_cache", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("tokens", ctypes.c_int64),
        ("kv_heads", ctypes.c_int64),
        ("head_bytes", ctypes.c_int64),
        ("block_size", ctypes.c_int64),
        ("key_stride", ctypes.c_int64 * 2),
        ("value_stride", ctypes.c_int64 * 2),
        ("cache_stride", ctypes.c_int64 * 3),
    )


class Lines(ctypes.Structure):
    """Of sparse prefill; see `sparse.h`. (Not `vllm_dca.method.vertical_slash.Lines`.)"""

    _fields_ = (
        ("vertical", ctypes.c_void_p),
        ("slash", ctypes.c_void_p),
        ("verticals", ctypes.c_void_p),
        ("distances", ctypes.c_void_p),
        ("budgets", ctypes.c_void_p),
        ("end", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("lines", ctypes.c_int64),
        ("slash_stride", ctypes.c_int64),
        ("min_keys", ctypes.c_int64),
        ("coverage", ctypes.c_double),
    )


def check(library: ctypes.CDLL) -> None:
    """Compare what both sides take for granted; a kernel that differs would corrupt memory."""
    numbers = (ctypes.c_int64 * 4)()
    library.layout(numbers)
    own = [*map(ctypes.sizeof, (Arguments, Tokens, Lines)), TILE]
    assert [*numbers] == own, f"the kernel's structures are {[*numbers]}, not {own}"
