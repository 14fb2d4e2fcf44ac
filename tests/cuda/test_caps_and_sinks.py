"""Soft caps and attention sinks in Triton's kernels, which have them in random batches too."""

import dataclasses
from typing import Any

import pytest
import torch

from tests.helpers import interpreter
from tests.helpers.caps_and_sinks import (
    EXTREME,
    assert_keep_their_digits,
    beside_large_sinks,
    extreme,
)
from tests.helpers.kernels import BOTH, CAPPED, PREFILLS, SUNK, decode, prefill
from tests.helpers.paged import Batch, Shape

interpreter.repair()
pytestmark = pytest.mark.usefixtures("short_shares")


def test_every_cut_equals_the_whole() -> None:
    """A prompt prefilled in two, and its end decoded by any number of programs."""
    shape = Shape([(70, 0)], num_kv_heads=1, **BOTH)
    batch = Batch.random(shape)
    whole = prefill(batch)
    for cut in (1, 16, 31, 48, 69):
        tail = dataclasses.replace(batch, shape=dataclasses.replace(shape, lengths=[(70, cut)]))
        tail.queries = [batch.queries[0][cut:]]
        assert (prefill(tail) - whole[cut:]).abs().max() <= batch.tolerance, cut
    for num_programs in (1, 2, 11):
        error = decode(tail, num_programs) - whole[69:]
        assert error.abs().max() <= batch.tolerance, num_programs


@EXTREME
def test_extreme_caps_and_sinks(
    sinks_at: float, soft_cap: float | None, dtype: torch.dtype
) -> None:
    batch = extreme(sinks_at, soft_cap, dtype)
    for by in PREFILLS.values():
        batch.assert_close(prefill(batch, by))
    batch.assert_close(decode(batch, 5))


def test_keys_beside_a_large_sink_keep_their_digits() -> None:
    batch, tolerance = beside_large_sinks()
    prefills = [prefill(batch, by) for by in PREFILLS.values()]
    outputs = [decode(batch, 1), decode(batch, 5), *prefills]
    assert_keep_their_digits(batch, tolerance, outputs)


@pytest.mark.parametrize("softmax", [CAPPED, SUNK], ids=["cap", "sinks"])
def test_tolerance_would_catch_what_is_left_out(softmax: dict[str, Any]) -> None:
    shape = Shape([(70, 69), (9, 0)])
    batch = Batch.random(dataclasses.replace(shape, **softmax))
    without = dataclasses.replace(batch, shape=shape)
    for output in (decode(without), prefill(without)):
        error = (output.double() - batch.exact).abs().max()
        assert error > 100 * batch.tolerance


@pytest.mark.parametrize(("lengths", "merges"), [([(16, 0)], 1), ([(70, 60)], 0)])
def test_caps_and_sinks_launch_little_more(lengths: list[tuple[int, int]], merges: int) -> None:
    """In one launch, nothing; by passes, the merge where there is else nothing to merge."""
    for name, more in (("triton", 0), ("triton_passes", merges)):
        counts = []
        for softmax in ({}, BOTH):
            batch = Batch.random(Shape(lengths, num_kv_heads=1, group=1, **softmax))
            with interpreter.launches() as launched:
                prefill(batch, PREFILLS[name])
            counts.append(sum(launched.values()))
        assert counts[1] == counts[0] + more
