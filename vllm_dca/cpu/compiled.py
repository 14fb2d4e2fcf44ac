"""Dual chunk attention on the CPU by a compiled kernel, `compiled.cpp` and what it includes.

It takes prefills and decode rows alike, in one call a layer. Where there is no compiler, the
three passes over `vllm_dca.cpu.paged_pass` and `vllm_dca.cpu.decode` do the same.
"""

import ctypes
import functools
import hashlib
import platform
from pathlib import Path

import torch

from vllm_dca.cpu import build, structures
from vllm_dca.cpu.rows import Rows
from vllm_dca.cpu.structures import Arguments, Tokens
from vllm_dca.method.geometry import ChunkGeometry
from vllm_dca.method.rotary import QueryRotation

SOURCE = Path(__file__).with_name("compiled.cpp")
PARTS = ("vectors.h", "panels.h", "few.h", "sparse.h", "weigh.h", "select.h")
# Beyond inductor's own.
FLAGS = ("-ffp-contract=fast", "-fno-math-errno", "-fno-unsafe-math-optimizations")
# The instruction sets that the kernel is written for, and the flags that leave out what a
# processor has beyond: bfloat16 multiplied in pairs; 32 registers of 16 floats; 16 of 8.
WITHOUT_BEYOND = {
    "AVX512_BF16": (),
    "AVX512": ("-mno-avx512bf16",),
    "AVX2": ("-mno-avx512f",),
    "baseline": ("-mno-avx512f", "-mno-avx2"),
}
ATTEND = {
    torch.float32: "attend_float32",
    torch.bfloat16: "attend_bfloat16",
    torch.float16: "attend_float16",
}


class CompiledPlan:
    """What all layers share: every new token of the batch, one a row.

    Made from the same arguments as `vllm_dca.cpu.plan_decode.DecodePlan`.
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
        self.arguments: dict[tuple[object, ...], Arguments] = {}  # by kind of layer
        assert block_table.dtype == torch.int32
        assert block_table.stride(1) == 1
        assert bool((self.rows.position >= 0).all())


def _source() -> str:
    """The kernel as one text, by which it is kept."""
    text = SOURCE.read_text()
    for part in PARTS:
        text = text.replace(f'#include "{part}"', SOURCE.with_name(part).read_text())
    return text


def instruction_sets() -> list[str]:
    """Those of `WITHOUT_BEYOND` that this processor has, the widest first.

    Those beyond what torch was told by ATEN_CPU_CAPABILITY are left out.
    """
    if platform.machine() != "x86_64":
        return ["baseline"]
    said = torch.backends.cpu.get_cpu_capability()
    has = {"AVX2": said.startswith("AVX"), "AVX512": said.startswith("AVX512")}
    bf16 = bool(torch.cpu.get_capabilities().get("avx512_bf16"))
    has |= {"AVX512_BF16": has["AVX512"] and bf16, "baseline": True}
    return [name for name in WITHOUT_BEYOND if has[name]]


def fastest() -> str:
    """The instruction set to compile the kernel for.

    Intel's processors multiply pairs of bfloat16 at half the rate of single floats
    (docs/cpu.md), so there bfloat16 is converted.
    """
    widest, *others = instruction_sets()
    is_intel = "Intel" in str(torch.cpu.get_capabilities().get("cpu_name"))
    return others[0] if is_intel and widest == "AVX512_BF16" else widest


@functools.cache
def library(instructions: str | None = None) -> ctypes.CDLL:
    """Compile the kernel, or find it compiled.

    Args:
        instructions: one of `instruction_sets()`; None for the fastest.

    Raises:
        BuildError: see `vllm_dca.cpu.build`.
    """
    # -march=native is another code on another processor that shares the folder.
    processor = repr(sorted(torch.cpu.get_capabilities().items()))
    named = f"-DPROCESSOR=0x{hashlib.sha256(processor.encode()).hexdigest()[:15]}"
    # Inductor's flags for gcc leave vectors to the code that it generates.
    vectors = ("-ftree-loop-vectorize",) if build.is_gcc() else ()
    lesser = WITHOUT_BEYOND[instructions or fastest()]
    flags = (named, *vectors, *FLAGS, *(lesser if platform.machine() == "x86_64" else ()))
    built = build.library(_source(), flags)
    built.instructions.restype = ctypes.c_char_p
    structures.check(built)
    return built


def instructions() -> str:
    """The instruction set that the kernel was compiled for."""
    name: bytes = library().instructions()
    return name.decode()


def attention(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    output: torch.Tensor,
    *,
    plan: CompiledPlan,
    rotation: QueryRotation,
    softmax_scale: float,
    soft_cap: float | None = None,
    sinks: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:
    """See `vllm_dca.method.device.DecodeAttention`, for a cache that is not quantised."""
    assert k_scale is None
    assert v_scale is None
    if sinks is not None:
        sinks = sinks.float().contiguous()
        assert sinks.shape == query.shape[1:2]
    # What layers have in common is written once a step. Where weights have filled the
    # processor's caches since, it takes Python a tenth of a short decode.
    kind = (
        *(query.dtype, kv_cache.dtype, output.dtype, query.shape, kv_cache.shape),
        *(query.stride(), kv_cache.stride(), output.stride()),
        *(rotation.cos_sin.data_ptr(), rotation.cos_sin.shape, rotation.is_neox),
        *(softmax_scale, soft_cap),
    )
    arguments = plan.arguments.get(kind)
    if arguments is None:
        rows, table, chunk_len = plan.rows, plan.block_table, plan.chunk_len
        of_layer = rotation, softmax_scale, soft_cap
        arguments = arguments_of(query, kv_cache, output, rows, table, chunk_len, *of_layer)
        plan.arguments[kind] = arguments
    arguments.query, arguments.kv_cache = query.data_ptr(), kv_cache.data_ptr()
    arguments.output = output.data_ptr()
    arguments.sinks = None if sinks is None else sinks.data_ptr()
    getattr(library(), ATTEND[query.dtype])(ctypes.byref(arguments))


def arguments_of(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    output: torch.Tensor,
    rows: Rows,
    block_table: torch.Tensor,
    chunk_len: int,
    rotation: QueryRotation,
    softmax_scale: float,
    soft_cap: float | None = None,
) -> Arguments:
    """The kernel's, without sinks; it holds no reference to the tensors.

    Args:
        query: [rows, num_heads, head_size], rotated to the offsets in their chunks.
        kv_cache: [num_blocks, num_kv_heads, block_size, 2 * head_size], of the same dtype.
        output: as the query.
        rows: of the query: requests, positions and turns.
        block_table: [num_requests, pages] int32.
        chunk_len: s, tokens.
        rotation: how far each region turns queries.
        softmax_scale: of the scores, before the cap.
        soft_cap: of the scores; None for none.
    """
    _, num_kv_heads, block_size, width = kv_cache.shape
    num_rows, num_heads, head_size = query.shape
    assert len(rows.position) == num_rows
    assert query.dtype == kv_cache.dtype == output.dtype
    assert rotation.cos_sin.dtype == torch.float32
    assert rotation.cos_sin.is_contiguous()
    assert width == 2 * head_size
    assert all(t.stride(-1) == 1 for t in (query, kv_cache, output))
    return Arguments(
        query=query.data_ptr(),
        kv_cache=kv_cache.data_ptr(),
        output=output.data_ptr(),
        cos_sin=rotation.cos_sin.data_ptr(),
        temperature=None if rows.temperature is None else rows.temperature.data_ptr(),
        position=rows.position.data_ptr(),
        request=rows.request.data_ptr(),
        turn=rows.turn.data_ptr(),
        block_table=block_table.data_ptr(),
        rows=num_rows,
        kv_heads=num_kv_heads,
        group=num_heads // num_kv_heads,
        head_size=head_size,
        rotary_dim=rotation.cos_sin.shape[-1],
        is_neox=rotation.is_neox,
        block_size=block_size,
        chunk_len=chunk_len,
        query_stride=query.stride()[:2],
        output_stride=output.stride()[:2],
        cache_stride=kv_cache.stride()[:3],
        table_stride=block_table.stride(0),
        scale=softmax_scale,
        soft_cap=soft_cap or 0.0,
    )


def write_kv(
    key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    """See `vllm_dca.method.kv_cache.write_kv`."""
    num_tokens, num_kv_heads, head_size = key.shape
    assert key.dtype == value.dtype == kv_cache.dtype
    assert key.shape == value.shape
    assert kv_cache.shape[-1] == 2 * head_size
    assert slot_mapping.dtype == torch.int64
    assert slot_mapping.is_contiguous()
    assert all(t.stride(-1) == 1 for t in (key, value, kv_cache))
    itemsize = key.itemsize
    tokens = Tokens(
        key=key.data_ptr(),
        value=value.data_ptr(),
        kv_cache=kv_cache.data_ptr(),
        slots=slot_mapping.data_ptr(),
        tokens=min(num_tokens, len(slot_mapping)),
        kv_heads=num_kv_heads,
        head_bytes=head_size * itemsize,
        block_size=kv_cache.shape[2],
        key_stride=tuple(step * itemsize for step in key.stride()[:2]),
        value_stride=tuple(step * itemsize for step in value.stride()[:2]),
        cache_stride=tuple(step * itemsize for step in kv_cache.stride()[:3]),
    )
    library().write_kv(ctypes.byref(tokens))
