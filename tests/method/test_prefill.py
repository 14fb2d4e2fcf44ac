"""How often a layer's operations are called for a prefill, whatever the batch."""

from collections import Counter
from typing import Any

import pytest

from tests.helpers.paged import CPU_OPERATIONS, Batch, Shape
from vllm_dca.method.device import PrefillOperations
from vllm_dca.method.prefill import by_passes


def calls_of(lengths: list[tuple[int, int]]) -> Counter[str]:
    batch = Batch.random(Shape(lengths, num_kv_heads=1, group=1))
    calls: Counter[str] = Counter()

    def counted(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return getattr(CPU_OPERATIONS, name)(*args, **kwargs)

        return call

    batch.prefill(by=by_passes(PrefillOperations(*map(counted, PrefillOperations._fields))))
    return calls


@pytest.mark.parametrize(
    "lengths",
    [[(70, 40)], [(1700, 0)], [(70, 40)] * 32],
    ids=["1 request", "100 chunks", "32 requests"],
)
def test_calls_of_a_layer_are_a_constant(lengths: list[tuple[int, int]]) -> None:
    assert calls_of(lengths) == {"turn": 1, "attend": 3, "merge": 1}


def test_passes_that_no_token_needs_are_left_out() -> None:
    assert calls_of([(16, 0)]) == {"attend": 1, "merge": 1}
    assert calls_of([(32, 0)]) == {"turn": 1, "attend": 2, "merge": 1}
