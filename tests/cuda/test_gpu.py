"""What only a GPU can show: no synchronisation, CUDA graphs, and launches as profiled."""

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.helpers import sparse as helper
from tests.helpers import sparse_checks
from tests.helpers.kernels import BOTH, PREFILLS, plan, planner
from tests.helpers.paged import DEVICE, Batch, Shape, query_start_loc
from vllm_dca.cuda import sparse_plan, sparse_probe
from vllm_dca.cuda.decode import decode_attention
from vllm_dca.cuda.device import prefill_by
from vllm_dca.cuda.sparse_prefill import Sparse
from vllm_dca.engine.providers import PROVIDERS
from vllm_dca.method.kv_cache import split_kv
from vllm_dca.method.provider import Needs, UnusableProviderError
from vllm_dca.method.sparse_operations import SparsePlan
from vllm_dca.method.sparse_prefill import SparseSizes
from vllm_dca.method.vertical_slash import Lines, Rule, select

SHAPE = Shape(
    [(1, 0)],
    chunk_len=64,
    local_size=32,
    block_size=16,
    head_size=64,
    rotary_dim=64,
    dtype=torch.bfloat16,
)


class OnDevice:
    """A batch whose tensors are on the device already, as an engine's are."""

    def __init__(self, lengths: list[tuple[int, int]], **softmax: Any) -> None:
        shape = dataclasses.replace(SHAPE, lengths=lengths, **softmax)
        self.batch = Batch.random(shape)
        self.softmax = self.batch.softmax(DEVICE)
        self.query = self.batch.rotated_query().to(DEVICE)
        self.kv_cache = self.batch.kv_cache.to(DEVICE)
        self.block_table = self.batch.block_table.to(DEVICE)
        self.rotation = self.batch.rotation(DEVICE)
        self.query_start_loc = query_start_loc(lengths)
        self.seq_lens = torch.tensor([total for total, _ in lengths], dtype=torch.int32)
        self.on_device = self.query_start_loc.to(DEVICE), self.seq_lens.to(DEVICE)
        self.planner = planner(self.batch.shape, len(self.query), 64)
        self.output = torch.empty_like(self.query)
        self.segments: SparsePlan
        self.prefill_sparsely: Sparse

    def prefill(self, name: str) -> None:
        prefill = PREFILLS[name]
        prefill.attend(
            self.query,
            *split_kv(self.kv_cache),
            self.output,
            plan=prefill.plan(
                self.query_start_loc.numpy(),
                self.seq_lens.numpy(),
                self.block_table,
                SHAPE.block_size,
                SHAPE.geometry,
            ),
            rotation=self.rotation,
            softmax_scale=SHAPE.scale,
            **self.softmax,
        )

    def decode(self) -> None:
        decode_attention(
            self.query,
            self.kv_cache,
            self.output,
            plan=self.planner.plan(*self.on_device, self.block_table, len(self.query)),
            rotation=self.rotation,
            softmax_scale=SHAPE.scale,
            **self.softmax,
        )

    def sparse(self) -> None:
        """In a step of its own, watched; buffers that hold all segments, as they stay."""
        self.prefill_sparsely.attend(
            self.query,
            self.kv_cache,
            self.output,
            plan=self.prefill_sparsely.plan(self.segments),
            rule=Rule(None, None, 0.9, 64),
            rotation=self.rotation,
            softmax_scale=SHAPE.scale,
            watch=lambda seen: seen.kept(seen.lines),
        )


def runs(batch: OnDevice, step: str) -> Callable[[], None]:
    return batch.decode if step == "decode" else functools.partial(batch.prefill, step)


SPARSE = {"chunk_len": 512, "local_size": 128}


def sparsely(lengths: list[tuple[int, int]]) -> Callable[[], None]:
    """Sparse prefill of a layer, planning included."""
    batch = OnDevice(lengths, **SPARSE)
    heads, most = batch.query.shape[1], len(batch.query)
    batch.segments = helper.plan(batch.batch)._replace(block_table=batch.block_table)
    batch.prefill_sparsely = Sparse(SparseSizes(heads, most, 1 << 14, 512, False), DEVICE)
    return batch.sparse


STEPS = pytest.mark.parametrize("step", ["decode", *PREFILLS])


def kernels(step: str, lengths: list[tuple[int, int]], **softmax: Any) -> Counter[str]:
    """Kernels and copies of one step, planning included, by name."""
    run = sparsely(lengths) if step == "sparse" else runs(OnDevice(lengths, **softmax), step)
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    device = torch.autograd.DeviceType.CUDA  # not the host's calls
    return Counter(event.name for event in profile.events() if event.device_type == device)


@STEPS
def test_launches_do_not_grow(step: str) -> None:
    """With requests, and with chunks."""
    new = 1 if step == "decode" else 200
    few = kernels(step, [(400, 400 - new)])
    assert few
    assert sum(kernels(step, [(400, 400 - new)] * 32).values()) == sum(few.values())
    assert sum(kernels(step, [(400, 400 - new)], **BOTH).values()) == sum(few.values())
    assert sum(kernels(step, [(6400, 6400 - new)]).values()) == sum(few.values())
    if step != "decode":
        assert sum(kernels(step, [(6400, 0)]).values()) == sum(few.values())


def test_launches_of_sparse_prefill_do_not_grow() -> None:
    few = kernels("sparse", [(512, 256)])
    assert few
    assert sum(kernels("sparse", [(512, 256)] * 32).values()) == sum(few.values())
    assert sum(kernels("sparse", [(6400, 0)]).values()) == sum(few.values())


@pytest.mark.parametrize("step", ["decode", *PREFILLS, "sparse"])
def test_nothing_synchronises(step: str) -> None:
    new = 1 if step == "decode" else 200
    if step == "sparse":
        run = sparsely([(900, 300), (400, 400 - new)])
    else:
        run = runs(OnDevice([(400, 400 - new), (30, 30 - min(new, 30))]), step)
    run()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
        with pytest.raises(RuntimeError, match="synchronizing"):
            torch.zeros(1, device=DEVICE).item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("rows", [1, 3])
def test_a_captured_graph_replays_across_chunk_borders(rows: int) -> None:
    """Captured below one chunk; replayed in later ones; three rows a request are speculated."""
    lengths = [(total, max(total - rows, 0)) for total in (500, 63, 64, 65, 129, 320, 20)]
    last = OnDevice(lengths, **(BOTH if rows > 1 else {}))
    starts, seq_lens = last.on_device
    plan = last.planner.plan(starts, torch.full_like(seq_lens, rows), last.block_table,
                             len(last.query))  # fmt: skip

    def attend() -> None:
        decode_attention(
            last.query,
            last.kv_cache,
            last.output,
            plan=plan,
            rotation=last.rotation,
            softmax_scale=SHAPE.scale,
            **last.softmax,
        )

    attend()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attend()
    last.planner.plan(starts, seq_lens, last.block_table, len(last.query))
    last.output.fill_(torch.nan)
    graph.replay()
    last.batch.assert_close(last.output.cpu())


def test_batches_of_a_real_size() -> None:
    """Long contexts, many splits, in every dtype; the same numbers from one to the next run."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        shape = dataclasses.replace(SHAPE, lengths=[(9000, 8999), (3000, 2999)], dtype=dtype)
        shape = dataclasses.replace(shape, chunk_len=1024, local_size=256)
        batch = Batch.random(shape)
        steps = planner(shape, 2, 64)
        query = batch.rotated_query().to(DEVICE)
        outputs = []
        for _ in range(2):
            output = torch.empty_like(query)
            decode_attention(
                query,
                batch.kv_cache.to(DEVICE),
                output,
                plan=plan(batch, steps, 2),
                rotation=batch.rotation(DEVICE),
                softmax_scale=shape.scale,
            )
            outputs.append(output.cpu())
        assert torch.equal(*outputs)
        batch.assert_close(outputs[0])


# Two sparse segments and nothing beside them: new tokens on both sides of a chunk's border.
LONG = dataclasses.replace(SHAPE, lengths=[(9000, 7800)], chunk_len=4096, local_size=1024)


def all_sparse(shape: Shape) -> tuple[Batch, SparsePlan]:
    batch = Batch.random(shape)
    plan = helper.plan(batch)
    assert len(plan.segments) == 2
    assert not helper.rest(batch, plan).any()
    return batch, plan


@pytest.mark.parametrize("rule", [Rule(None, None, 0.9, 64), None])
def test_sparse_prefill_of_a_real_size(rule: Rule | None) -> None:
    """Several blocks and spans of the sizes that serve: lines as torch selects them from the
    same weights, attention along them, and the same bits again.
    """
    batch, plan = all_sparse(LONG)
    shape, [(total, cached)] = batch.shape, batch.shape.lengths
    heads = shape.num_kv_heads * shape.group
    if rule is None:
        rule = Rule(torch.full((heads,), 700), torch.full((heads,), 500), 1.0, 0)
    sizes = SparseSizes(heads, total - cached, total, shape.chunk_len, rule.continuous)
    layers = Sparse(sizes, DEVICE)
    planned = layers.plan(plan._replace(block_table=batch.block_table.to(DEVICE)))
    query, cache = batch.rotated_query().to(DEVICE), batch.kv_cache.to(DEVICE)
    [round_], given = planned.rounds, {"rotation": batch.rotation(DEVICE)}
    weights = layers.buffers.weights_of(round_.probe)
    sparse_probe.weigh(
        query, cache, weights, probe=round_.probe, block_table=planned.block_table,
        chunk_len=shape.chunk_len, line_width=rule.line_width,
        softmax_scale=shape.scale, **given,
    )  # fmt: skip
    slash = weights.slash.sum(0)
    first, right = 0, []
    for segment in plan.segments:
        vertical = weights.vertical[:, first : first + segment.end]
        lines = (segment.end - 1) // rule.line_width + 1
        right.append(select(vertical, slash[:, first : first + lines], rule))
        first += sparse_plan.places_of(segment.end)
    outputs = []
    for _ in range(2):
        # A row that is not written equals none.
        outputs.append(torch.full_like(query, torch.nan))
        layers.attend(
            query, cache, outputs[-1], plan=planned, rule=rule.to(DEVICE),
            softmax_scale=shape.scale, **given,
        )  # fmt: skip
    assert torch.equal(*outputs)
    for index, segment in enumerate(plan.segments):
        found = layers.buffers.lines_of(round_, index)
        assert all(map(torch.equal, found, right[index]))
        taken = Lines(*(each.cpu() for each in found))
        sparse_checks.assert_attends(batch, segment, taken, outputs[0][segment.rows].cpu())


# Whole prompts, ends of long ones, and one new token, over several chunks.
PIECES = [(2000, 0), (1800, 1700), (700, 699), (512, 511)]


def make_values_finite(batch: Batch) -> None:
    """Where none is stored: the largest number in place of NaN. Keys stay NaN.

    For what reads values to its tile's end, and gives those past the keys a weight of 0, as
    flash-attention 3 does: 0 * NaN would stay. In serving they are numbers, since vLLM zeroes
    its cache. A key too many still is NaN, a weight too many huge.
    """
    _, values = split_kv(batch.kv_cache)
    values[values.isnan()] = torch.finfo(values.dtype).max


@pytest.mark.parametrize("soft_cap", [None, 5.0])
@pytest.mark.parametrize("head_size", [64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", PROVIDERS["cuda"])
def test_every_provider_that_is_here_agrees(
    name: str, dtype: torch.dtype, head_size: int, soft_cap: float | None
) -> None:
    """With sinks too."""
    block_size = 256  # the least that the flash-attn package takes
    capability = torch.cuda.get_device_capability()
    needs = Needs(head_size, dtype, dtype, block_size, capability, soft_cap is not None)
    try:
        attend = PROVIDERS["cuda"][name](needs)
    except UnusableProviderError as error:
        pytest.skip(str(error))
    shape = dataclasses.replace(
        SHAPE,
        lengths=PIECES,
        chunk_len=512,
        local_size=128,
        block_size=block_size,
        head_size=head_size,
        dtype=dtype,
        soft_cap=soft_cap,
        has_sinks=soft_cap is not None,
    )
    batch = Batch.random(shape)
    if not name.startswith("triton"):
        make_values_finite(batch)
    batch.assert_close(batch.prefill(by=prefill_by(attend), device=DEVICE))
