"""Every kernel launched as the backend does, of the shapes that are common; to be compiled."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from vllm_dca.cuda.decode import decode_attention
from vllm_dca.cuda.merge import merge_parts
from vllm_dca.cuda.paged_pass import attention
from vllm_dca.cuda.plan_decode import DecodePlanner, programs, rows_a_pack
from vllm_dca.cuda.plan_prefill import plan_walk
from vllm_dca.cuda.prefill import walk_attention
from vllm_dca.cuda.sparse_prefill import Sparse
from vllm_dca.cuda.turn import turn_queries
from vllm_dca.method.device import Partial
from vllm_dca.method.geometry import ChunkGeometry
from vllm_dca.method.kv_cache import split_kv
from vllm_dca.method.planning import plan_prefill
from vllm_dca.method.rotary import QueryRotation
from vllm_dca.method.sparse_operations import SparsePlan
from vllm_dca.method.sparse_planning import Segment
from vllm_dca.method.sparse_prefill import SparseSizes
from vllm_dca.method.vertical_slash import Rule


class Shape(NamedTuple):
    """Of a layer: what its kernels are compiled for."""

    name: str
    heads: int
    kv_heads: int
    head_size: int
    soft_cap: float | None = None
    has_sinks: bool = False


SHAPES = [
    Shape("Llama-3-8B", 32, 8, 128),
    Shape("MQA", 48, 1, 256),
    Shape("Qwen2.5-7B", 28, 4, 128),
    Shape("Llama-2-7B", 32, 32, 128),
    Shape("SmolLM2-135M", 9, 3, 64),
    Shape("Gemma-like", 8, 4, 256),
    Shape("Phi-like", 32, 32, 80),
    Shape("GLM-4-9B", 32, 2, 128),
]
# What few models have, and other kernels are compiled for.
WITH_MORE = [
    Shape("Gemma-2", 16, 8, 256, soft_cap=50.0),
    Shape("gpt-oss", 64, 8, 64, has_sinks=True),
    Shape("Gemma-4", 8, 2, 512),
    Shape("heads of 320", 8, 2, 320),
]
ROWS, PAGE, GEOMETRY = 4, 16, ChunkGeometry(6144, 1024)
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def dtypes_of(capability: int, names: Sequence[str] | None = None) -> list[Any]:
    """Pairs of a model's and its KV cache's; of all models' dtypes, or of those named."""
    fp8 = [torch.float8_e5m2] + [torch.float8_e4m3fn] * (capability >= 89)
    pairs = [(d, d) for d in DTYPES] + [(torch.bfloat16, c) for c in fp8]
    return [pair for pair in pairs if names is None or name_of(pair[0]) in names]


def every(shape: Shape, dtype: torch.dtype, cache: torch.dtype):
    """Every kernel once, as the backend launches it."""
    passes(shape, dtype, cache)
    prefill(shape, dtype, cache)
    decode(shape, dtype, cache)


def layer(shape: Shape, dtype: torch.dtype, cache: torch.dtype):
    """A KV cache, and what else each launch over it is given."""
    kv_cache = torch.zeros(2, shape.kv_heads, PAGE, 2 * shape.head_size, dtype=cache)
    scale = torch.ones(1) if cache != dtype else None
    more = {"softmax_scale": 0.1, "soft_cap": shape.soft_cap}
    return kv_cache, {**more, "k_scale": scale, "v_scale": scale}


def of_all(shape: Shape, dtype: torch.dtype):
    """What a launch is given that does all of DCA."""
    rotation = QueryRotation(torch.zeros(64, shape.head_size), True)
    sinks = torch.zeros(shape.heads, dtype=dtype) if shape.has_sinks else None
    return {"rotation": rotation, "sinks": sinks}


def tokens(shape: Shape, dtype: torch.dtype, cache: torch.dtype):
    """Of a prefill: queries, cache and output; their lengths; what else a launch is given."""
    query = torch.zeros(ROWS, shape.heads, shape.head_size, dtype=dtype)
    kv_cache, given = layer(shape, dtype, cache)
    starts = np.arange(ROWS + 1, dtype=np.int32)
    table = torch.zeros(ROWS, 1, dtype=torch.int32)
    lengths = starts, starts[1:], table, PAGE, GEOMETRY
    return (query, *split_kv(kv_cache), torch.empty_like(query)), lengths, given


def passes(
    shape: Shape,
    dtype: torch.dtype,
    cache: torch.dtype,
    masks: tuple[bool, ...] = (True, False),
):
    """A turn, passes that are causal or not, and a merge."""
    tensors, lengths, given = tokens(shape, dtype, cache)
    query, more = tensors[0], of_all(shape, dtype)
    indices = torch.zeros(ROWS, dtype=torch.int32)
    turn_queries(query, more["rotation"], indices, indices)
    [segments] = plan_prefill(*lengths).passes
    for causal in masks:
        attention(*tensors, segments=dataclasses.replace(segments, causal=causal), **given)
    lse = torch.zeros(shape.heads, ROWS)
    part = Partial(query, lse, indices, indices)
    merge_parts(query, lse, [part, part], more["sinks"])


def prefill(shape: Shape, dtype: torch.dtype, cache: torch.dtype):
    """In one launch."""
    tensors, lengths, given = tokens(shape, dtype, cache)
    walk_attention(*tensors, plan=plan_walk(*lengths), **of_all(shape, dtype), **given)


def decode(shape: Shape, dtype: torch.dtype, cache: torch.dtype):
    """A row a request, and as many as stand in one tile."""
    kv_cache, given = layer(shape, dtype, cache)
    starts = torch.arange(2, dtype=torch.int32)
    group = shape.heads // shape.kv_heads
    for rows in (1, 2 * rows_a_pack(group)):
        query = torch.zeros(rows, shape.heads, shape.head_size, dtype=dtype)
        planner = DecodePlanner(GEOMETRY, None, rows, group, programs(132), query.device)
        decode_attention(
            query,
            kv_cache,
            torch.empty_like(query),
            plan=planner.plan(starts, starts[:1], starts[:1, None], rows),
            **of_all(shape, dtype),
            **given,
        )


def sparse(shape: Shape, dtype: torch.dtype, cache: torch.dtype):
    """Of sparse prefill, by coverage and by budgets; not of its dense rest."""
    segment = Segment(0, 0, 256, 0)
    query = torch.zeros(segment.end, shape.heads, shape.head_size, dtype=dtype)
    kv_cache, given = layer(shape, dtype, cache)
    del given["soft_cap"]
    table = torch.zeros(1, segment.end // PAGE, dtype=torch.int32)
    plan = SparsePlan([segment], table, GEOMETRY, None)
    budgets = torch.zeros(shape.heads, dtype=torch.int64)
    for rule in (Rule(None, None, 0.95, 1024), Rule(budgets, budgets, 1.0, 0)):
        sizes = SparseSizes(shape.heads, 256, 256, GEOMETRY.chunk_len, rule.continuous)
        layers = Sparse(sizes, query.device)
        layers.attend(
            query,
            kv_cache,
            torch.empty_like(query),
            plan=layers.plan(plan),
            rule=rule,
            rotation=of_all(shape, dtype)["rotation"],
            **given,
        )
