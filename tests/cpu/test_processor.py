"""Which dtype to serve in, by what the processor multiplies."""

import pytest
import torch

from vllm_dca.cpu.processor import Processor, processor

ALL = {"amx_bf16": True, "avx512_bf16": True}


@pytest.mark.parametrize(
    ("instructions", "has", "half"),
    [
        ("AVX512", ALL, "AMX"),
        ("AVX512", {"amx_bf16": True}, "AMX"),
        ("AVX512", {"avx512_bf16": True}, "AVX512_BF16"),
        ("AVX512", {"amx_bf16": False, "avx512_bf16": False}, None),
        # Where torch is told to do without AVX-512, or does not say what there is.
        ("AVX2", ALL, None),
        ("DEFAULT", {}, None),
    ],
)
def test_half_precision_is_for_processors_that_multiply_it(
    instructions: str, has: dict[str, bool], half: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: instructions)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    dtype = torch.float32 if half is None else torch.bfloat16
    assert processor() == Processor(instructions, half, dtype)
