"""A loss of half the CPU's speed does not pass unseen: ratios to vLLM's own, in one run."""

from collections.abc import Iterator

import pytest
import torch

from scripts.bench.cpu import measure
from vllm_dca.cpu import compiled

# Of CPU_ATTN's time, by the instructions for which the kernel was compiled. The record
# (docs/results/cpu.json) has for this shape, in this order, 0.94, 0.49, 0.91 and 0.54 on
# AVX512_BF16. On AVX2, three turns of what this test does, on a quiet machine, had at most
# 0.36, 0.34, 0.53 and 0.39, and at least 0.33, 0.33, 0.50 and 0.37. The limits are a third
# above these or more, on AVX2 a half, for a busy machine. A kernel half as fast is above each.
# Of others, such as an Intel Xeon with AVX512, single turns on a shared machine are known only.
ALL = [(step, dtype) for step in ("prefill", "decode") for dtype in ("float32", "bfloat16")]
LIMITS = {"AVX512_BF16": (1.3, 0.75, 1.3, 0.85), "AVX2": (0.55, 0.55, 0.8, 0.6)}
NOT_MEASURED = (1.4,) * 4  # other instructions
TRIES = 3  # what else runs seldom slows DCA alone three times
# vLLM's own has half precision's tiles where the processor has AMX; DCA's kernel has not.
TIMED = ALL[::2] if torch.cpu._is_amx_tile_supported() else ALL


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("step", "dtype"), TIMED)
def test_attention_keeps_up_with_vllms(step: str, dtype: str) -> None:
    instructions = compiled.instructions()
    limits = dict(zip(ALL, LIMITS.get(instructions, NOT_MEASURED), strict=True))
    found = []
    for _ in range(TRIES):
        row = measure(step, "SmolLM2-135M", dtype, batch=1, context=8192, repeats=9)
        found.append((row["ratio"], row["share"]))
        # A prefill's share is of torch.mm in the same run; the records have 0.86 and more.
        if row["ratio"] <= limits[step, dtype] and (step == "decode" or row["share"] >= 0.5):
            return
    pytest.fail(f"{instructions}: {found}, DCA / CPU_ATTN and the share of the machine")
