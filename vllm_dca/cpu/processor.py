"""What this processor multiplies, which decides the dtype to serve in."""

from typing import NamedTuple

import torch


class Processor(NamedTuple):
    """A processor, as far as speed depends on it.

    Attributes:
        instructions: the widest that torch and the compiled kernel use, for people to read.
        half: what multiplies bfloat16, for people to read; None if nothing does, so that half
            precision is converted number by number.
        dtype: the fastest one to serve in.
    """

    instructions: str
    half: str | None
    dtype: torch.dtype


def processor() -> Processor:
    """The one that this process runs on."""
    instructions = torch.backends.cpu.get_cpu_capability()
    has = torch.cpu.get_capabilities()
    # Without AVX-512, torch and oneDNN use neither.
    half = None
    if "512" in instructions and has.get("amx_bf16"):
        half = "AMX"
    elif "512" in instructions and has.get("avx512_bf16"):
        half = "AVX512_BF16"
    return Processor(instructions, half, torch.bfloat16 if half else torch.float32)
