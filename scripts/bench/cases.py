"""What is timed on a GPU: shapes of models, batches, contexts; small ones for a rehearsal."""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from scripts.bench import clock

K = 1024
DTYPE = torch.bfloat16


class Shape(NamedTuple):
    """Of a layer, and its chunks."""

    name: str
    heads: int
    kv_heads: int
    head_size: int
    chunk_size: int
    local_size: int


class Case(NamedTuple):
    """A batch in which each request has `context` tokens, the last `new` of them queries."""

    shape: Shape
    batch: int
    context: int
    new: int

    def __str__(self) -> str:
        return f"{self.shape.name}, batch {self.batch}, {self.new:,} of {self.context:,} tokens"

    @property
    def cache_bytes(self) -> int:
        """Keys and values, read once."""
        shape = self.shape
        each = 2 * shape.kv_heads * shape.head_size * DTYPE.itemsize
        return self.batch * self.context * each

    @property
    def operations(self) -> int:
        """Of the two products, for the keys that causal queries see."""
        shape = self.shape
        seen = self.new * (2 * self.context - self.new + 1) // 2
        return 4 * self.batch * seen * shape.heads * shape.head_size


SHAPES = [
    Shape("Llama-3-8B", 32, 8, 128, 6144, 1024),
    # Below 253,952 tokens it has one chunk, and from twice that on inter keys.
    Shape("Qwen2.5-7B-1M", 28, 4, 128, 262144, 8192),
]
CONTEXTS = [8 * K, 32 * K, 128 * K, 512 * K, 1024 * K]
BATCHES = [1, 2, 4, 8, 16, 32, 64]
NEW = 8 * K
# In the interpreter: one chunk, and three.
TINY = Shape("tiny", 6, 2, 32, 48, 16)
# Chunks of 256: a segment has no fewer tokens.
TINY_SPARSE = Shape("tiny", 1, 1, 32, 320, 64)


def decode(small: bool) -> Iterator[Case]:
    if small:
        yield from (Case(TINY, batch, context, 1) for batch in (1, 2) for context in (20, 90))
        return
    for shape in SHAPES:
        for context in CONTEXTS:
            for batch in BATCHES:
                case = Case(shape, batch, context, 1)
                if case.cache_bytes <= clock.memory():
                    yield case


def prefill(small: bool) -> Iterator[Case]:
    if small:
        yield from (Case(TINY, 1, context, 20) for context in (20, 90))
        return
    for shape in SHAPES:
        for context in CONTEXTS:
            yield Case(shape, 1, context, NEW)


def sparse(small: bool) -> Iterator[Case]:
    """All of the new tokens in segments, one or several."""
    if small:
        yield Case(TINY_SPARSE, 1, 512, 256)
        return
    yield from (case for case in prefill(False) if case.context > case.new)
