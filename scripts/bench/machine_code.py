"""What can be counted in a kernel's machine code, as cuobjdump prints it."""

import re
import subprocess
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import triton

BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+)?\s*([A-Z][^;]*);")
JUMP = re.compile(r"(?:BRA|CALL)\S*\s.*?(0x[0-9a-f]+)")
# Of the tensor cores: up to 8.9, 9.0, and from 10.0.
PRODUCT = re.compile(r"HMMA|HGMMA|UTC\w*MMA")


class Loop(NamedTuple):
    """The smallest loop that multiplies most.

    Attributes:
        instructions: of a warp, once around; branches not taken included.
        products: those of the tensor cores among them.
    """

    instructions: int
    products: int


def dumped(cubin: bytes, what: str) -> str:
    """By cuobjdump, which Triton's wheel has."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.check_output(
            [BINARIES / "cuobjdump", what, file.name], text=True, stderr=subprocess.DEVNULL
        )


def loop_of(code: str) -> Loop:
    """Of a kernel as `cuobjdump -sass` prints it.

    Raises:
        ValueError: no loop has a product.
    """
    found = [(int(at, 16), when, what) for at, when, what in INSTRUCTION.findall(code)]
    after = dict(zip((at for at, *_ in found), (at for at, *_ in found[1:]), strict=False))
    text = {at: what for at, _, what in found}
    before = defaultdict(set)
    jumps = []
    for at, when, what in found:
        jump = JUMP.match(what)
        if jump:
            before[int(jump[1], 16)].add(at)
            jumps.append((at, int(jump[1], 16)))
        ends = what.startswith(("BRA", "EXIT", "RET")) and not when
        if at in after and not ends:
            before[after[at]].add(at)
    loops = []
    for at, head in jumps:
        if head > at:
            continue
        # All that leads to the jump back, without its goal.
        body, open_ = {head}, [at]
        while open_:
            one = open_.pop()
            if one not in body:
                body.add(one)
                open_ += before[one]
        products = sum(bool(PRODUCT.match(text[one])) for one in body)
        loops.append(Loop(len(body), products))
    most = max((loop.products for loop in loops), default=0)
    if not most:
        raise ValueError("no loop multiplies by tensor cores")
    return min(loop for loop in loops if loop.products == most)
