"""Soft caps and attention sinks in Triton's kernels, which have them in random batches too."""

import dataclasses
from typing import Any

import pytest
import torch

from tests.helpers import interpreter
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


@pytest.mark.parametrize(
    ("sinks_at", "soft_cap", "dtype"),
    [
        (-1e4, 1e-3, torch.float16),
        (-100.0, None, torch.float32),
        (30.0, None, torch.float16),
        (100.0, 1e4, torch.float32),
        (1e4, 1e-3, torch.float32),
    ],
)
def test_extreme_caps_and_sinks(
    sinks_at: float, soft_cap: float | None, dtype: torch.dtype
) -> None:
    """Sinks that count for nothing and for all, and a row of one key."""
    lengths = [(1, 0), (35, 31), (17, 15)]
    softmax = {"soft_cap": soft_cap, "has_sinks": True, "sinks_at": sinks_at}
    batch = Batch.random(Shape(lengths, dtype=dtype, **softmax))
    for by in PREFILLS.values():
        batch.assert_close(prefill(batch, by))
    batch.assert_close(decode(batch, 5))


def test_keys_beside_a_large_sink_keep_their_digits() -> None:
    """Hundreds of keys, each of a weight that half precision would round beside the sink's."""
    sizes = {"chunk_len": 256, "local_size": 128, "block_size": 64, "num_kv_heads": 1}
    shape = Shape([(600, 599)], dtype=torch.float16, **sizes)
    without = Batch.random(shape)
    batch = Batch.random(dataclasses.replace(shape, has_sinks=True, sinks_at=14.0))
    expected = batch.exact
    # All that a sink does is to leave the keys of its head a share, rounded to what fp16 has.
    share = expected.norm(dim=-1) / without.exact.norm(dim=-1)
    assert share.min() < 1e-5 < 1e-3 < share.max()
    limits = torch.finfo(torch.float16)
    tolerance = without.tolerance * share + limits.smallest_normal * limits.eps
    prefills = [prefill(batch, by) for by in PREFILLS.values()]
    for output in (decode(batch, 1), decode(batch, 5), *prefills):
        assert ((output.double() - expected).abs().amax(-1) <= tolerance).all()


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
