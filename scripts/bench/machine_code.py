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
# Not BRA.DIV: where the threads of a warp would go that are not at one place. All of these
# kernels' are, and what a shuffle is in that case is longer than the loop.
JUMP = re.compile(r"(?:BRA|CALL)(?!\.DIV)\S*\s.*?(0x[0-9a-f]+)")
# Not BRA with a predicate before its goal.
ENDS = re.compile(r"BRA\S*\s+0x|EXIT|RET")
# Of the tensor cores: up to 8.9, 9.0, and from 10.0.
PRODUCT = re.compile(r"HMMA|HGMMA|UTC\w*MMA")


class Loop(NamedTuple):
    """Of the innermost loops that multiply, the one that does most, and the smallest of these.

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


def _reached(start: int, edges: dict[int, set[int]], goal: int | None = None) -> set[int]:
    """What edges lead to from `start`; from the goal they lead no further."""
    found, open_ = {start}, [start]
    while open_:
        one = open_.pop()
        new = edges[one] - found if one != goal else set()
        found |= new
        open_ += new
    return found


def loop_of(code: str) -> Loop:
    """Of a kernel as `cuobjdump -sass` prints it.

    Raises:
        ValueError: no loop has a product.
    """
    found = [(int(at, 16), when, what) for at, when, what in INSTRUCTION.findall(code)]
    text = {at: what for at, _, what in found}
    after, before = defaultdict(set), defaultdict(set)
    for (at, when, what), following in zip(found, [*list(text)[1:], None], strict=True):
        jump = JUMP.match(what)
        goals = {int(jump[1], 16)} if jump else set()
        if when or not ENDS.match(what):
            goals |= {following} - {None}
        for goal in goals:
            after[at].add(goal)
            before[goal].add(at)
    run = _reached(found[0][0], after)
    # All that leads to a jump back, from its goal.
    loops = [run & _reached(at, before, head) for at in run for head in after[at] if head <= at]
    products = {at for at, what in text.items() if PRODUCT.match(what)}
    loops = [loop for loop in loops if loop & products]
    if not loops:
        raise ValueError("no loop multiplies by tensor cores")
    inner = [loop for loop in loops if not any(other < loop for other in loops)]
    most = max(len(loop & products) for loop in inner)
    return min(Loop(len(loop), most) for loop in inner if len(loop & products) == most)
