"""Dual chunk attention on the CPU by a compiled kernel, `attention_cpu.cpp`.

It takes prefills and decode rows alike, in one call a layer. Where there is no compiler, the
three passes over `vllm_dca.providers.torch_cpu` and `vllm_dca.decode_cpu` do the same.
"""

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path

import torch

from vllm_dca.geometry import ChunkGeometry
from vllm_dca.rotary import QueryRotation
from vllm_dca.rows import Rows

SOURCE = Path(__file__).with_name("attention_cpu.cpp")
# Beyond inductor's own flags, which leave vectors to the code that it generates.
FLAGS = ("-ftree-loop-vectorize", "-ffp-contract=fast", "-fno-math-errno")


class _Arguments(ctypes.Structure):
    """The kernel's `Arguments`."""

    _fields_ = (
        ("query", ctypes.c_void_p),
        ("kv_cache", ctypes.c_void_p),
        ("output", ctypes.c_void_p),
        ("cos_sin", ctypes.c_void_p),
        ("temperature", ctypes.c_void_p),
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
    )


class CompiledPlan:
    """What all layers share: every new token of the batch, one a row.

    Made from the same arguments as `vllm_dca.decode_cpu.DecodePlan`.
    """

    def __init__(
        self,
        query_start_loc: torch.Tensor,
        seq_lens: torch.Tensor,
        block_table: torch.Tensor,
        block_size: int,
        geometry: ChunkGeometry,
        original_max_position_embeddings: int | None = None,
    ) -> None:
        length = original_max_position_embeddings
        self.rows = Rows.of(query_start_loc, seq_lens, geometry, length)
        self.block_table = block_table
        self.chunk_len = geometry.chunk_len
        assert block_table.dtype == torch.int32
        assert block_table.stride(1) == 1
        assert bool((self.rows.position >= 0).all())


@functools.cache
def load() -> Callable[..., None]:
    """Compile the kernel, or find it compiled.

    Returns:
        A function like `vllm_dca.decode_cpu.decode_attention`, for a `CompiledPlan`.

    torch's builder for its own compiled CPU code does it: it finds the compiler, names the
    instruction set, links OpenMP, and keeps the result on disk, under a lock.

    Raises:
        Exception: of many kinds; there is no compiler that can.
    """
    from torch._inductor.codecache import CppCodeCache

    library = CppCodeCache.load(SOURCE.read_text(), extra_flags=FLAGS, needs_vec_isa=True)
    kernels = {
        torch.float32: library.attend_float32,
        torch.bfloat16: library.attend_bfloat16,
        torch.float16: library.attend_float16,
    }

    def attention(
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        output: torch.Tensor,
        *,
        plan: CompiledPlan,
        rotation: QueryRotation,
        softmax_scale: float,
        k_scale: torch.Tensor | None = None,
        v_scale: torch.Tensor | None = None,
    ) -> None:
        """See `vllm_dca.decode_cpu.decode_attention`."""
        _, num_kv_heads, block_size, width = kv_cache.shape
        num_rows, num_heads, head_size = query.shape
        rows = plan.rows
        assert len(rows.position) == num_rows
        assert query.dtype == kv_cache.dtype == output.dtype
        assert rotation.cos_sin.dtype == torch.float32
        assert rotation.cos_sin.is_contiguous()
        assert width == 2 * head_size
        assert all(t.stride(-1) == 1 for t in (query, kv_cache, output))
        arguments = _Arguments(
            query=query.data_ptr(),
            kv_cache=kv_cache.data_ptr(),
            output=output.data_ptr(),
            cos_sin=rotation.cos_sin.data_ptr(),
            temperature=None if rows.temperature is None else rows.temperature.data_ptr(),
            position=rows.position.data_ptr(),
            request=rows.request.data_ptr(),
            turn=rows.turn.data_ptr(),
            block_table=plan.block_table.data_ptr(),
            rows=num_rows,
            kv_heads=num_kv_heads,
            group=num_heads // num_kv_heads,
            head_size=head_size,
            rotary_dim=rotation.cos_sin.shape[-1],
            is_neox=rotation.is_neox,
            block_size=block_size,
            chunk_len=plan.chunk_len,
            query_stride=query.stride()[:2],
            output_stride=output.stride()[:2],
            cache_stride=kv_cache.stride()[:3],
            table_stride=plan.block_table.stride(0),
            scale=softmax_scale,
        )
        kernels[query.dtype](ctypes.byref(arguments))

    return attention
