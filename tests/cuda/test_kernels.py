"""The Triton kernels, under Triton's interpreter, against the reference."""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from scripts.bench import balance, moves
from tests.cpu.test_attention import DTYPES, shapes
from tests.helpers import interpreter
from tests.helpers.caches import fp8_dtypes
from tests.helpers.cases import cases
from tests.helpers.paged import DEVICE, Batch, Shape, query_start_loc
from vllm_dca.cuda import plan_decode, tuning
from vllm_dca.cuda.decode import decode_attention
from vllm_dca.cuda.device import WALK, prefill_by
from vllm_dca.cuda.paged_pass import attention
from vllm_dca.cuda.plan_decode import DecodePlan, DecodePlanner
from vllm_dca.method.device import Prefill
from vllm_dca.method.kv_cache import split_kv

# What few models have.
CAPPED, SUNK = {"soft_cap": 2.0}, {"has_sinks": True}
BOTH = {**CAPPED, **SUNK}
SOFTMAX = pytest.mark.parametrize("softmax", [{}, BOTH], ids=["plain", "cap and sinks"])

PREFILLS = {"triton": WALK, "triton_passes": prefill_by(attention)}
EITHER = pytest.mark.parametrize("name", PREFILLS)

interpreter.repair()


@pytest.fixture(autouse=True, scope="module")
def _short_shares() -> Iterator[None]:
    """The interpreter is slow: let several programs share a context of a hundred tokens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_decode, "MIN_SHARE", 1)
        patch.setattr(plan_decode, "PACK_COST", 1)
        patch.setattr(tuning, "MAX_TILE", 16)
        yield


E5M2 = torch.float8_e5m2
# As the kernels in docs/results/ were compiled: by head size, dtype and KV cache.
SERVED_STAGES = {
    (64, torch.bfloat16, torch.bfloat16): 4,
    (64, torch.bfloat16, E5M2): 6,
    (64, torch.float32, torch.float32): 6,
    (128, torch.bfloat16, torch.bfloat16): 3,
    (128, torch.bfloat16, E5M2): 4,
    (128, torch.float32, torch.float32): 4,
    (256, torch.bfloat16, torch.bfloat16): 3,
    (256, torch.bfloat16, E5M2): 4,
    (256, torch.float32, torch.float32): 3,
}


@pytest.mark.parametrize("largest_tile", [16, 64])
def test_few_tiles_are_on_their_way(largest_tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of heads of any size, with the tiles of these tests too: a GPU compiles each stage."""
    monkeypatch.setattr(tuning, "MAX_TILE", largest_tile)
    for size, dtype, queries in itertools.product(range(8, 520, 8), DTYPES, (1, 16, 64)):
        for cache in (dtype, E5M2):
            stages = tuning.decode_tuning(size, dtype, cache, queries).num_stages
            assert stages <= 6, (size, dtype, cache)
            if largest_tile == 64:
                assert stages == SERVED_STAGES.get((size, dtype, cache), stages)


def planner(shape: Shape, max_rows: int, num_programs: int) -> DecodePlanner:
    return DecodePlanner(
        shape.geometry,
        shape.original_max_position_embeddings,
        max_rows,
        shape.group,
        num_programs,
        DEVICE,
    )


def plan(batch: Batch, planner: DecodePlanner, num_rows: int) -> DecodePlan:
    lengths = batch.shape.lengths
    return planner.plan(
        query_start_loc(lengths).to(DEVICE),
        torch.tensor([total for total, _ in lengths], dtype=torch.int32, device=DEVICE),
        batch.block_table.to(DEVICE),
        num_rows,
    )


def attend(batch: Batch, query: torch.Tensor, plan: DecodePlan) -> torch.Tensor:
    query = query.to(DEVICE)
    output = torch.full_like(query, torch.nan)
    decode_attention(
        query,
        batch.kv_cache.to(DEVICE),
        output,
        plan=plan,
        rotation=batch.rotation(DEVICE),
        softmax_scale=batch.shape.scale,
        **batch.softmax(DEVICE),
        **batch.scales(DEVICE),
    )
    return output.cpu()


def decode(batch: Batch, num_programs: int = 7) -> torch.Tensor:
    query = batch.rotated_query()
    steps = planner(batch.shape, len(query), num_programs)
    return attend(batch, query, plan(batch, steps, len(query)))


def prefill(batch: Batch, by: Prefill = WALK) -> torch.Tensor:
    return batch.prefill(by=by, device=DEVICE)


@st.composite
def cached_shapes(draw: st.DrawFn, decode: bool = False) -> Shape:
    """Shapes with every kind of cache: FP8, and either order in memory; capped, with sinks."""
    shape = draw(shapes(decode, softmax=True))
    kinds = st.sampled_from([None, *fp8_dtypes()])
    return dataclasses.replace(shape, cache_dtype=draw(kinds), tokens_first=draw(st.booleans()))


@settings(max_examples=cases(40), deadline=None)
@given(cached_shapes(decode=True), st.integers(1, 12))
def test_decode_agrees_with_reference(shape: Shape, num_programs: int) -> None:
    batch = Batch.random(shape)
    batch.assert_close(decode(batch, num_programs))


@settings(max_examples=cases(50), deadline=None)
@given(cached_shapes(), st.sampled_from(list(PREFILLS)))
def test_prefill_agrees_with_reference(shape: Shape, name: str) -> None:
    """In one launch, and by three passes and a merge."""
    batch = Batch.random(shape)
    batch.assert_close(prefill(batch, PREFILLS[name]))


@settings(max_examples=cases(15), deadline=None)
@given(cached_shapes())
def test_decode_takes_any_number_of_new_tokens(shape: Shape) -> None:
    """Each tile with the turns of its own rows."""
    batch = Batch.random(shape)
    batch.assert_close(decode(batch, 3))


# Every size with one query a key; with more, what has other tiles.
HEAD_SIZES = {
    1: (32, 64, 72, 80, 96, 128, 160, 256, 320),
    7: (64, 72, 128, 320),
    71: (32, 80, 320),
}


@pytest.mark.parametrize(
    ("group", "head_size"),
    [(group, size) for group, sizes in HEAD_SIZES.items() for size in sizes],
)
def test_head_sizes_and_groups(group: int, head_size: int) -> None:
    shape = Shape([(50, 49), (20, 17)], head_size=head_size, rotary_dim=32, group=group)
    shape = dataclasses.replace(shape, num_kv_heads=1, seed=head_size)
    batch = Batch.random(shape)
    batch.assert_close(decode(batch))
    # A tile of queries is then less than a token's.
    if group < 71 or head_size == 32:
        batch.assert_close(prefill(batch))
    if group < 71:
        batch.assert_close(prefill(batch, PREFILLS["triton_passes"]))


@pytest.mark.parametrize(("temperature", "softmax"), [(None, {}), (20, {}), (20, BOTH)])
def test_decode_row_equals_prefill_row(
    temperature: int | None, softmax: dict[str, Any]
) -> None:
    """One request at every length around three chunks, and all of its rows at once."""
    shape = Shape([(70, 30)], original_max_position_embeddings=temperature, **softmax)
    batch = Batch.random(shape)
    assert (decode(batch) - prefill(batch)).abs().max() <= batch.tolerance


def parts_of(plan: DecodePlan, sequences: int) -> list[list[tuple[int, int, int]]]:
    """What each program takes, as the kernels work it out: pack, sequence, units."""
    first = plan.first_unit.tolist()
    units = first[-1] * sequences
    share = -(-units // min(max(units // plan_decode.MIN_SHARE, 1), plan.num_programs))
    owners = [
        (pack, sequence)
        for pack, (start, end) in enumerate(itertools.pairwise(first))
        for sequence in range(sequences)
        for _ in range(end - start)
    ]
    return [
        [
            (*owner, sum(1 for _ in run))
            for owner, run in itertools.groupby(owners[at : at + share])
        ]
        for at in range(0, plan.num_programs * share, share)
    ]


def test_shares_are_equal_and_cover_all() -> None:
    lengths = [(70, 69), (1, 0), (17, 14), (40, 37), (33, 32)]
    batch = Batch.random(Shape(lengths, group=24))
    for num_programs in (1, 2, 5, 50):
        found = plan(batch, planner(batch.shape, 11, num_programs), 10)
        assert found.row_keys.tolist() == [70, 1, 15, 16, 17, 38, 39, 40, 33, 0]
        # Two rows of 24 heads fit a tile: three rows are two packs.
        assert found.packs.tolist() == [
            [0, 0, 1, 70],
            [1, 1, 1, 1],
            [2, 2, 2, 16],
            [2, 4, 1, 17],
            [3, 5, 2, 39],
            [3, 7, 1, 40],
            [4, 8, 1, 33],
            *[[0, 0, 0, 0]] * 3,
        ]
        units = [-(-keys // 16) + plan_decode.PACK_COST for *_, keys in found.packs[:7]]
        assert found.first_unit.diff().tolist() == [*units, 0, 0, 0]
        parts = parts_of(found, 3)
        sizes = [sum(size for *_, size in part) for part in parts]
        assert sum(sizes) == 3 * sum(units)
        used = [size for size in sizes if size]
        assert set(used[:-1]) <= {max(used)}
        assert max(used) == -(-sum(sizes) // min(num_programs, sum(sizes)))


@pytest.mark.parametrize("rows", [1, 3])
def test_balance_cuts_as_the_plan_does(rows: int) -> None:
    """The record in docs/ is of the plan that runs."""
    totals = [70, 9, 17, 40, 133]
    batch = Batch.random(Shape([(total, total - rows) for total in totals], group=24))
    for num_programs in (1, 3, 10, 200):
        step = balance.Step(np.array(totals), rows, heads=48, kv_heads=2)
        found = balance.pieces(step, num_programs)
        steps = planner(batch.shape, rows * len(totals), num_programs)
        planned = plan(batch, steps, rows * len(totals))
        passed, read = Counter[tuple[int, int]](), []
        for part in parts_of(planned, 2):
            read.append(0)
            for pack, sequence, size in part:
                sees = int(planned.packs[pack, 3])
                for sign in (-1, 1):
                    units = max(passed[pack, sequence] - plan_decode.PACK_COST, 0)
                    read[-1] += sign * min(units * plan_decode.UNIT, sees)
                    passed[pack, sequence] += size if sign < 0 else 0
        assert np.bincount(found.program, found.keys, num_programs).tolist() == read


@pytest.mark.parametrize(("rows", "read"), [(1, 1), (4, 1), (21, 1), (22, 2)])
def test_rows_of_a_request_read_the_cache_once(rows: int, read: int) -> None:
    """As many as fit beside a group of three heads."""
    batch = Batch.random(Shape([(70, 70 - rows)]))
    found = plan(batch, planner(batch.shape, rows, 3), rows)
    assert int((found.packs[:, 3] > 0).sum()) == read
    assert found.pack_rows == min(rows, 21)


@pytest.mark.parametrize("cached", range(20, 36, 3))
def test_rows_that_cross_every_border(cached: int) -> None:
    """A short prefill whose tile holds rows of three chunks, over keys of five."""
    # In fp32 a tile holds fewer rows.
    dtype = torch.bfloat16 if cached % 2 else torch.float32
    lengths = [(cached + 15, cached), (50, 49)]
    shape = Shape(lengths, chunk_len=8, block_size=4, local_size=6, dtype=dtype)
    batch = Batch.random(shape)
    together = decode(batch, 5)
    batch.assert_close(together)
    assert (together - prefill(batch)).abs().max() <= batch.tolerance


@SOFTMAX
def test_one_launch_crosses_every_border(softmax: dict[str, Any]) -> None:
    """Rows of five chunks, in tiles of one; as passes have them, and however they are cut."""
    lengths = [(40, 0), (33, 9), (24, 23), (8, 0)]
    shape = Shape(lengths, chunk_len=8, block_size=4, local_size=6, group=7, **softmax)
    batch = Batch.random(shape)
    together = prefill(batch)
    batch.assert_close(together)
    by_passes = prefill(batch, PREFILLS["triton_passes"])
    assert (together - by_passes).abs().max() <= batch.tolerance


@SOFTMAX
def test_packed_rows_are_as_rows_alone(softmax: dict[str, Any]) -> None:
    """However a prefill is cut into steps, its rows' answers are the same."""
    batch = Batch.random(Shape([(70, 40)], **softmax))
    whole, query = decode(batch), batch.rotated_query()
    for size in (1, 4, 17):
        steps = planner(batch.shape, size, 4)
        for first in range(0, 30, size):
            rows = query[first : first + size]
            starts = torch.tensor([0, len(rows)], dtype=torch.int32, device=DEVICE)
            seq_lens = torch.tensor([40 + first + len(rows)], dtype=torch.int32, device=DEVICE)
            found = steps.plan(starts, seq_lens, batch.block_table.to(DEVICE), len(rows))
            error = attend(batch, rows, found) - whole[first : first + size]
            assert error.abs().max() <= batch.tolerance


@pytest.mark.skipif(DEVICE.type != "cpu", reason="compiles dozens; the interpreter tells")
@pytest.mark.parametrize("group", [7, 14])
def test_any_rows_find_a_kernel_of_a_power_of_two(group: int) -> None:
    """What `vllm_dca.engine.warmup` launches; in fp32 there are several blocks."""

    def kernels(rows: list[int]) -> set[tuple[Any, ...]]:
        with interpreter.launches() as launched:
            for each in rows:
                decode(Batch.random(Shape([(each, 0)], num_kv_heads=4, group=group)), 2)
        return set(launched)

    most = plan_decode.rows_a_pack(group)
    powers = [1 << power for power in range(most.bit_length() + 1)]
    found = kernels([*range(1, most + 1)])
    assert found
    assert found <= kernels(powers)


def test_buffers_stay_and_rows_that_pad_are_zero() -> None:
    """As a captured graph replays: the same addresses, whatever the lengths, and padding."""
    shape = Shape([(1, 0)] * 3)
    steps = planner(shape, 4, 6)
    addresses = set()
    for lengths in ([(1, 0)] * 3, [(16, 15), (70, 69), (33, 32)], [(17, 16), (15, 14)]):
        batch = Batch.random(dataclasses.replace(shape, lengths=lengths))
        query = batch.rotated_query()
        padding = torch.full((4 - len(query), *query.shape[1:]), torch.nan)
        found = plan(batch, steps, 4)
        addresses.add(
            tuple(
                getattr(found, name).data_ptr() for name in ("row_keys", "packs", "first_unit")
            )
        )
        output = attend(batch, torch.cat([query, padding]), found)
        batch.assert_close(output[: len(query)])
        assert (output[len(query) :] == 0).all()
    assert len(addresses) == 1


@pytest.mark.parametrize("rows", [1, 3])
def test_launches_replay_for_other_lengths(rows: int) -> None:
    """What was launched for one batch answers another: only buffers' contents differ."""
    lengths = [(50, 50 - rows), (17, 17 - rows), (64, 64 - rows)]
    batch = Batch.random(Shape(lengths))
    query = batch.rotated_query().to(DEVICE)
    steps = planner(batch.shape, len(query), 5)
    starts = query_start_loc(lengths).to(DEVICE)
    seq_lens = torch.full((3,), rows, dtype=torch.int32, device=DEVICE)
    captured = steps.plan(starts, seq_lens, batch.block_table.to(DEVICE), len(query))
    batch_lens = torch.tensor([total for total, _ in lengths], dtype=torch.int32, device=DEVICE)
    steps.plan(starts, batch_lens, batch.block_table.to(DEVICE), len(query))
    batch.assert_close(attend(batch, query, captured))


def test_tolerance_would_catch_a_wrong_region() -> None:
    """The check can fail: one position too few towards the previous chunk is seen."""
    batch = Batch.random(Shape([(70, 69)]))
    wrong = dataclasses.replace(
        batch, shape=dataclasses.replace(batch.shape, local_size=batch.shape.local_size - 1)
    )
    error = (decode(wrong).double() - batch.exact).abs().max()
    assert error > 100 * batch.tolerance


class NeverWaits(TorchDispatchMode):
    """Refuses torch's operations that read something back from the device."""

    WAITING = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "unique")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.name().removeprefix("aten::").split(".")[0]
        assert name not in self.WAITING, f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("lengths", "regions"),
    [
        ([(16, 0)], 1),
        ([(32, 30)], 2),
        ([(70, 60)], 3),
        ([(1700, 1690)], 3),
        ([(70, 66)] * 9, 3),
    ],
)
def test_launches_are_as_many_as_the_benchmark_says(
    lengths: list[tuple[int, int]], regions: int
) -> None:
    batch = Batch.random(Shape(lengths, num_kv_heads=1, group=1))
    for name, launches in (("triton", moves.by_one_launch), ("triton_passes", moves.by_passes)):
        with interpreter.launches() as launched:
            prefill(batch, PREFILLS[name])
        assert sum(launched.values()) == launches(regions).launches


@EITHER
def test_nothing_waits_for_the_device(name: str) -> None:
    """Neither planning a step nor a layer's own work reads anything back."""
    batch = Batch.random(Shape([(70, 40), (20, 0)]))
    query, kv_cache, block_table, starts = (
        tensor.to(DEVICE)
        for tensor in (
            batch.rotated_query(),
            batch.kv_cache,
            batch.block_table,
            query_start_loc([(70, 69), (20, 19)]),
        )
    )
    rotation = batch.rotation(DEVICE)
    steps = planner(batch.shape, 4, 4)
    seq_lens = torch.tensor([70, 20], dtype=torch.int32, device=DEVICE)
    with NeverWaits():
        by = PREFILLS[name]
        found = by.plan([0, 30, 50], [70, 20], block_table, 4, batch.shape.geometry)
        by.attend(
            query,
            *split_kv(kv_cache),
            torch.empty_like(query),
            plan=found,
            rotation=rotation,
            softmax_scale=1.0,
        )
        steps.plan(starts, seq_lens, block_table, 2)
    with NeverWaits(), pytest.raises(AssertionError, match="waits for the device"):
        seq_lens.max().item()
