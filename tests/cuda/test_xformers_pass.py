"""xformers as a provider: the real package's masks, checks and shapes; numbers by a stand-in.

Its operators run on a GPU only. Here one computes, on the CPU, what xformers' mask says.
"""

import dataclasses
import functools
import math
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from tests.helpers.cases import cases
from tests.helpers.paged import Batch, Shape, query_start_loc
from tests.helpers.shapes import shapes
from tests.helpers.xformers_on_cuda import card, fmha
from vllm_dca.cpu.merge import merge_parts
from vllm_dca.cuda import xformers_pass
from vllm_dca.engine.support import KV_CACHE_DTYPES
from vllm_dca.method.device import PrefillOperations
from vllm_dca.method.kv_cache import split_kv
from vllm_dca.method.planning import PrefillPlan, plan_prefill
from vllm_dca.method.prefill import by_passes
from vllm_dca.method.provider import Needs, PagedSegments, UnusableProviderError
from vllm_dca.method.rotary import turn_queries

CUDA = torch.device("cuda")


class StandIn(fmha.flash.FwOp):
    """The flash operator, with an attention that materialises the mask."""

    SUPPORTED_DEVICES = {"cpu"}  # noqa: RUF012
    SUPPORTED_DTYPES = fmha.flash.FwOp.SUPPORTED_DTYPES | {torch.float32}
    calls = 0

    @classmethod
    def not_supported_reasons(cls, d: Any) -> list[str]:
        found = super().not_supported_reasons(d)
        return [reason for reason in found if "bf16 is only supported on A100+" not in reason]

    @classmethod
    def apply(cls, inp: Any, needs_gradient: bool) -> tuple[torch.Tensor, Any]:
        cls.calls += 1
        query, key, value = (tensor.float() for tensor in (inp.query, inp.key, inp.value))
        scores = torch.einsum("bmghd,bnghd->bghmn", query, key) * inp.scale_float
        scores += inp.attn_bias.materialize(tuple(scores.shape))
        lse = scores.logsumexp(-1)
        # Not by the log-sum-exp, which is rounded: kernels divide by the sum.
        weights = scores.softmax(-1).to(inp.query.dtype).float()
        output = torch.einsum("bghmn,bnghd->bmghd", weights, value).to(inp.query.dtype)
        return output, fmha.Context(out=output, lse=lse)


def attend(operator: Any = StandIn) -> Any:
    return functools.partial(xformers_pass._attention, fmha, operator, WeakKeyDictionary())


@settings(max_examples=cases(40), deadline=None)
@given(shapes())
def test_prefill_agrees_with_reference(shape: Shape) -> None:
    batch = Batch.random(shape)
    operations = PrefillOperations(turn_queries, attend(), merge_parts)
    batch.assert_close(batch.prefill(by=by_passes(operations)))


def planned(shape: Shape) -> PrefillPlan:
    return plan_prefill(
        query_start_loc(shape.lengths).numpy(),
        [total for total, _ in shape.lengths],
        Batch.random(shape).block_table,
        shape.block_size,
        shape.geometry,
    )


@settings(max_examples=cases(40), deadline=None)
@given(shapes())
def test_masks_let_each_query_see_its_segments_keys(shape: Shape) -> None:
    for segments in planned(shape).passes:
        gathered = xformers_pass.gather(fmha, segments, shape.block_size)
        size = int(segments.query_lens.sum()), int(segments.key_lens.sum())
        expected = torch.zeros(size, dtype=torch.bool)
        row = column = 0
        for index, (rows, columns) in enumerate(
            zip(segments.query_lens.tolist(), segments.key_lens.tolist(), strict=True)
        ):
            for i in range(rows):
                seen = columns - rows + i + 1 if segments.causal else columns
                expected[row + i, column : column + seen] = True
            position = torch.arange(columns)
            pages = segments.block_table[index, position // shape.block_size]
            keys = slice(column, column + columns)
            assert torch.equal(gathered.page[keys], pages.long())
            assert torch.equal(gathered.slot[keys], position % shape.block_size)
            row, column = row + rows, column + columns
        mask = gathered.mask.materialize(size)
        assert torch.equal(mask == 0, expected)
        assert torch.equal(mask == -math.inf, ~expected)


def test_a_step_works_out_its_keys_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """For all layers of a plan; and nothing is kept of a plan that is gone."""
    made: list[PagedSegments] = []
    gather = xformers_pass.gather
    monkeypatch.setattr(
        xformers_pass,
        "gather",
        lambda fmha, segments, size: made.append(segments) or gather(fmha, segments, size),
    )
    shape = Shape([(70, 20), (16, 0)], dtype=torch.bfloat16)
    batch, plan, kept = Batch.random(shape), planned(shape), WeakKeyDictionary()
    provider = functools.partial(xformers_pass._attention, fmha, StandIn, kept)
    query = batch.rotated_query()
    calls = StandIn.calls
    for _ in range(3):
        provider(query, *split_kv(batch.kv_cache), torch.empty_like(query),
                 segments=plan.passes[0], softmax_scale=1.0)  # fmt: skip
    assert StandIn.calls - calls == 3
    assert len(made) == len(kept) == 1
    made.clear()
    del plan
    assert len(kept) == 0


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (9, 0), (10, 0), (12, 0)])
def test_it_serves_what_its_operators_do(capability: tuple[int, int]) -> None:
    """Every dtype and kind of cache that DCA serves, and head sizes of all kinds."""
    served = set()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for cache in {dtype, *filter(None, KV_CACHE_DTYPES.values())}:
            for head_size in (8, 16, 32, 60, 64, 80, 96, 100, 128, 160, 192, 256, 264, 320):
                needs = Needs(head_size, dtype, cache, 16, capability)
                with card(capability):
                    key = torch.empty(1, 1, 1, 1, head_size, dtype=cache, device=CUDA)
                    inputs = fmha.Inputs(key.to(dtype), key, key, scale=1.0, is_partial=True)
                    can = cache == dtype and fmha.flash.FwOp.supports(inputs)
                    try:
                        provider = xformers_pass.provider(needs)
                    except UnusableProviderError:
                        provider = None
                assert (provider is not None) == can, needs
                if provider:
                    served.add((dtype, head_size))
                    assert provider.args[1] is fmha.flash.FwOp
    sizes = (8, 16, 32, 64, 80, 96, 128, 160, 192, 256)
    halves = (torch.bfloat16, torch.float16)
    assert served == {(d, s) for d in halves for s in sizes if capability >= (8, 0)}


NEEDS = Needs(128, torch.bfloat16, torch.bfloat16, 16, (9, 0))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": torch.float32, "cache_dtype": torch.float32}, "takes float16 and bfloat16"),
        ({"cache_dtype": torch.float8_e4m3fn}, "cannot read a torch.float8_e4m3fn cache"),
        ({"head_size": 100}, "up to 256 in steps of 8, not 100"),
        ({"has_soft_cap": True}, "no soft cap on scores; flash-attention's and triton do"),
        ({"capability": (7, 5)}, r"need compute capability 8.0, and this is \(7, 5\)"),
    ],
)
def test_it_says_why_it_cannot(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnusableProviderError, match=reason):
        xformers_pass.provider(dataclasses.replace(NEEDS, **changes))


def test_a_library_for_another_cuda_is_told() -> None:
    """What vLLM's CUDA 13 meets with the published wheel, which is built for CUDA 12.8."""
    with (
        card((9, 0), library=False),
        pytest.raises(
            UnusableProviderError, match=r"fa3F.*wasn't built.*fa2F.*CUDA.*xformers.info"
        ),
    ):
        xformers_pass.provider(NEEDS)


@pytest.mark.parametrize(("num_kv_heads", "group"), [(2, 1), (2, 3), (1, 4)])
def test_shapes_through_the_real_operator(num_kv_heads: int, group: int) -> None:
    """On a pretended card: xformers checks them, and its kernel's own shapes come back.

    A fake tensor has no numbers, so that reading one back from the device is an error too.
    """
    heads, head_size, page = num_kv_heads * group, 64, 16
    with card((9, 0)):
        provider = xformers_pass.provider(NEEDS)
        for causal in (True, False):
            lengths = np.array([5, 3]), np.array([20, 33])
            segments = PagedSegments(
                *lengths,
                *(torch.empty(size, dtype=torch.int32, device=CUDA) for size in (3, 3, 2)),
                torch.empty(2, 3, dtype=torch.int32, device=CUDA),
                causal,
            )
            # As a projection leaves it: keys and values stand behind each token's query.
            projected = torch.empty(
                8, heads + 2 * num_kv_heads, head_size, dtype=torch.bfloat16, device=CUDA
            )
            cache = torch.empty(
                7, num_kv_heads, page, 2 * head_size, dtype=torch.bfloat16, device=CUDA
            )
            output = torch.empty(8, heads, head_size, dtype=torch.bfloat16, device=CUDA)
            lse = provider(
                projected[:, :heads],
                *split_kv(cache),
                output,
                segments=segments,
                softmax_scale=0.1,
            )
            assert lse.shape == (heads, 8)
            assert (lse.dtype, lse.device.type) == (torch.float32, "cuda")
