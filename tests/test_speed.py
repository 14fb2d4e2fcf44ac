"""A twofold loss of the CPU's speed does not pass unseen: ratios to vLLM's own, in one run."""

import pytest
import torch
from bench_cpu import measure


# The record, docs/results/cpu.json, has 0.9 to 1.05 for prefill and 1.0 to 1.6 for decode; what
# a kernel half as fast would have is above these, and a busy machine's noise is below.
@pytest.mark.parametrize(("step", "limit"), [("prefill", 1.7), ("decode", 2.5)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attention_keeps_up_with_vllms(step: str, limit: float, dtype: str) -> None:
    torch.set_num_threads(2)
    row = measure(step, "SmolLM2-135M", dtype, batch=1, context=8192, repeats=9)
    assert row["ratio"] <= limit, row
