"""The decode kernel and its plan against the reference, in Triton's interpreter or on a GPU."""

import dataclasses
import itertools
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scripts.bench import balance
from tests.helpers import interpreter
from tests.helpers.cases import cases
from tests.helpers.kernels import SOFTMAX, attend, cached_shapes, decode, plan, planner
from tests.helpers.paged import DEVICE, Batch, Shape, query_start_loc
from vllm_dca.cuda import plan_decode
from vllm_dca.cuda.plan_decode import DecodePlan

interpreter.repair()
pytestmark = pytest.mark.usefixtures("short_shares")


@settings(max_examples=cases(40), deadline=None)
@given(cached_shapes(decode=True), st.integers(1, 12))
def test_decode_agrees_with_reference(shape: Shape, num_programs: int) -> None:
    batch = Batch.random(shape)
    batch.assert_close(decode(batch, num_programs))


@settings(max_examples=cases(15), deadline=None)
@given(cached_shapes())
def test_decode_takes_any_number_of_new_tokens(shape: Shape) -> None:
    """Each tile with the turns of its own rows."""
    batch = Batch.random(shape)
    batch.assert_close(decode(batch, 3))


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


@pytest.mark.parametrize(("rows", "requests"), [(4, 3), (3, 4)])
def test_a_step_that_the_buffers_do_not_hold_is_refused(rows: int, requests: int) -> None:
    """It would be written past their ends."""
    batch = Batch.random(Shape([(9, 8)] * requests))
    plan(batch, planner(batch.shape, 4, 2), rows)
    with pytest.raises(RuntimeError, match=rf"{rows} rows of {requests} req.* for 3 of each"):
        plan(batch, planner(batch.shape, 3, 2), rows)


@pytest.mark.parametrize("longest", [3, None])
def test_uneven_rows_are_packed_by_the_longest_request(longest: int | None) -> None:
    """As few queries as serve are multiplied; if nobody knows, as many as fit."""
    lengths = [(50, 49), (70, 67), (33, 32)]
    batch = Batch.random(Shape(lengths))
    query = batch.rotated_query().to(DEVICE)
    steps = planner(batch.shape, len(query), 5)
    starts = query_start_loc(lengths).to(DEVICE)
    seq_lens = torch.tensor([total for total, _ in lengths], dtype=torch.int32, device=DEVICE)
    found = steps.plan(starts, seq_lens, batch.block_table.to(DEVICE), len(query), longest)
    assert found.pack_rows == (longest or steps.pack_rows)
    batch.assert_close(attend(batch, query, found))


def test_a_launch_gets_no_numpy_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    """V1's drafters count a batch's tokens in numpy, and only the interpreter takes that."""
    launched: list[Any] = []

    class Recorder:
        def __getitem__(self, grid: Any) -> Any:
            return lambda *arguments, **constants: launched.extend(arguments)

    monkeypatch.setattr(plan_decode, "_plan_kernel", Recorder())
    batch = Batch.random(Shape(lengths=((40, 38), (70, 68))))
    planner(batch.shape, 8, 2).plan(
        query_start_loc(batch.shape.lengths).to(DEVICE),
        torch.tensor([40, 70], dtype=torch.int32, device=DEVICE),
        batch.block_table.to(DEVICE),
        np.int32(4),
        np.int32(2),
    )
    numbers = [each for each in launched if not isinstance(each, torch.Tensor)]
    assert numbers
    assert {type(each) for each in numbers} == {int}


def test_tolerance_would_catch_a_wrong_region() -> None:
    """The check can fail: one position too few towards the previous chunk is seen."""
    batch = Batch.random(Shape([(70, 69)]))
    wrong = dataclasses.replace(
        batch, shape=dataclasses.replace(batch.shape, local_size=batch.shape.local_size - 1)
    )
    error = (decode(wrong).double() - batch.exact).abs().max()
    assert error > 100 * batch.tolerance
