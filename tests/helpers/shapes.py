"""Shapes of batches, and how hypothesis draws them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from vllm_dca.method.geometry import ChunkGeometry

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@dataclass(frozen=True)
class Shape:
    """Everything about a batch but its numbers. Lengths are (tokens, of these cached)."""

    lengths: list[tuple[int, int]]
    chunk_len: int = 16
    local_size: int = 8
    block_size: int = 4
    num_kv_heads: int = 2
    group: int = 3
    head_size: int = 16
    rotary_dim: int = 16
    is_neox: bool = True
    original_max_position_embeddings: int | None = None
    dtype: torch.dtype = torch.float32
    mscale: float = 1.0
    cache_dtype: torch.dtype | None = None  # FP8, or None for the same
    tokens_first: bool = False  # in memory: a page's tokens, then its heads
    soft_cap: float | None = None
    has_sinks: bool = False
    sinks_at: float = 0.0  # what they are spread around
    rope_base: float = 100.0
    sharpness: float = 1.2  # of attention, which shall be far from uniform
    seed: int = 0

    @property
    def scale(self) -> float:
        """On dot products: as models have it, and a little more."""
        return self.sharpness * self.head_size**-0.5

    @property
    def geometry(self) -> ChunkGeometry:
        return ChunkGeometry(self.chunk_len + self.local_size, self.local_size)


@st.composite
def shapes(
    draw: st.DrawFn,
    decode: bool = False,
    softmax: bool = False,
    head_sizes: Sequence[int] = (8, 16, 40),
) -> Shape:
    block_size = draw(st.sampled_from([1, 2, 3, 4, 5, 8, 12, 16, 48]))
    chunk_len = block_size * draw(st.integers(1, 4))
    longest = min(5 * chunk_len, 150)
    # Chunk and block borders, and one to either side, more often than chance has it.
    border = st.integers(0, longest // block_size).map(lambda n: n * block_size)
    near = st.tuples(border, st.integers(-1, 1)).map(lambda pair: max(1, sum(pair)))
    total = st.one_of(near, st.integers(1, longest))

    def lengths() -> tuple[int, int]:
        tokens = draw(total)
        if decode:
            return tokens, max(0, tokens - draw(st.integers(1, 3)))
        return tokens, min(draw(st.one_of(st.just(0), total)), tokens - 1)

    head_size = draw(st.sampled_from(head_sizes))
    return Shape(
        lengths=[lengths() for _ in range(draw(st.integers(1, 4)))],
        chunk_len=chunk_len,
        local_size=draw(st.integers(1, 2 * chunk_len)),  # s < w too
        block_size=block_size,
        num_kv_heads=draw(st.integers(1, 3)),
        group=draw(st.integers(1, 4)),
        head_size=head_size,
        rotary_dim=draw(st.sampled_from([head_size, head_size // 2])),
        is_neox=draw(st.booleans()),
        original_max_position_embeddings=draw(st.sampled_from([None, 1, 20])),
        dtype=draw(st.sampled_from(DTYPES)),
        mscale=draw(st.sampled_from([1.0, 1.2])),
        soft_cap=draw(st.sampled_from([None, None, 1.0, 50.0])) if softmax else None,
        has_sinks=softmax and draw(st.booleans()),
        seed=draw(st.integers(0, 999)),
    )
