"""Sparse prefill on the CPU by the compiled kernel: `weigh.h`, `select.h`, `sparse.h`."""

import ctypes

import torch

from vllm_dca.cpu import structures
from vllm_dca.cpu.compiled import arguments_of, library
from vllm_dca.cpu.rows import Rows
from vllm_dca.method.planning import turns_of
from vllm_dca.method.rotary import QueryRotation
from vllm_dca.method.sparse_config import TILE
from vllm_dca.method.sparse_operations import SparsePlan
from vllm_dca.method.sparse_planning import Segment
from vllm_dca.method.vertical_slash import FIRST_KEYS, NEAR_DIAGONALS, PROBE, Lines, Rule


def weigh(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    *,
    segment: Segment,
    plan: SparsePlan,
    rule: Rule,
    rotation: QueryRotation,
    softmax_scale: float,
    k_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `vllm_dca.method.sparse_operations.WeighLines`, for a cache that is not quantised."""
    assert k_scale is None
    heads, end = query.shape[1], segment.end
    num_lines = (end - 1) // rule.line_width + 1
    vertical = torch.empty(heads, end)
    slash = torch.zeros(heads, 2 * TILE + num_lines)[:, 2 * TILE :]
    probe = query[-PROBE:]
    _call(
        "weigh",
        probe,
        kv_cache,
        probe,
        _weights(vertical, slash, rule),
        segment._replace(begin=end - PROBE),
        plan,
        rotation,
        softmax_scale,
        rule.continuous,
    )
    return vertical, slash


def select(vertical: torch.Tensor, slash: torch.Tensor, rule: Rule) -> Lines:
    """See `vllm_dca.method.vertical_slash.select`."""
    heads, end = vertical.shape
    assert vertical.is_contiguous()
    assert slash.stride(1) == 1
    assert vertical.dtype == slash.dtype == torch.float32
    chosen = Lines(
        torch.zeros(heads, end, dtype=torch.bool),
        torch.zeros(heads, end + TILE + 1, dtype=torch.bool),
    )
    lines = _weights(vertical, slash, rule)
    lines.verticals, lines.distances = (each.data_ptr() for each in chosen)
    budgets = None
    if rule.verticals is not None and rule.slashes is not None:
        budgets = torch.stack([rule.verticals, rule.slashes])
        assert (budgets.shape, budgets.dtype) == ((2, heads), torch.int64)
        lines.budgets = budgets.data_ptr()
    library().select_lines(
        ctypes.byref(lines), *map(ctypes.c_int64, (heads, FIRST_KEYS, NEAR_DIAGONALS))
    )
    return chosen


def attend(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    output: torch.Tensor,
    *,
    segment: Segment,
    plan: SparsePlan,
    lines: Lines,
    rotation: QueryRotation,
    softmax_scale: float,
) -> None:
    """See `vllm_dca.method.sparse_operations.AttendLines`."""
    verticals, distances = (each.contiguous() for each in lines)
    selected = structures.Lines(
        verticals=verticals.data_ptr(), distances=distances.data_ptr(), end=segment.end
    )
    _call(
        "attend_lines",
        query,
        kv_cache,
        output,
        selected,
        segment,
        plan,
        rotation,
        softmax_scale,
    )


def _weights(vertical: torch.Tensor, slash: torch.Tensor, rule: Rule) -> structures.Lines:
    return structures.Lines(
        vertical=vertical.data_ptr(),
        slash=slash.data_ptr(),
        end=vertical.shape[1],
        width=rule.line_width,
        lines=slash.shape[1],
        slash_stride=slash.stride(0),
        min_keys=rule.min_keys,
        coverage=rule.coverage,
    )


def _call(
    name: str,
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    output: torch.Tensor,
    lines: structures.Lines,
    segment: Segment,
    plan: SparsePlan,
    rotation: QueryRotation,
    softmax_scale: float,
    continuous: bool = False,
) -> None:
    """The kernel's function for these rows, those of a segment."""
    assert plan.block_table.dtype == torch.int32
    assert plan.block_table.stride(1) == 1
    position = torch.arange(segment.begin, segment.end)
    length = plan.original_max_position_embeddings
    turns = turns_of(position.numpy(), plan.geometry, length, continuous)
    rows = Rows(torch.zeros_like(position), position, *turns)
    arguments = arguments_of(
        query,
        kv_cache,
        output,
        rows,
        plan.block_table[segment.request, None],
        plan.geometry.chunk_len,
        rotation,
        softmax_scale,
    )
    dtype = str(query.dtype).removeprefix("torch.")
    getattr(library(), f"{name}_{dtype}")(ctypes.byref(arguments), ctypes.byref(lines))
