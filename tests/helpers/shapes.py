"""Batches of every shape, as hypothesis draws them."""

import torch
from hypothesis import strategies as st

from tests.helpers.paged import Shape

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@st.composite
def shapes(draw: st.DrawFn, decode: bool = False, softmax: bool = False) -> Shape:
    block_size = draw(st.sampled_from([1, 2, 4, 8, 16]))
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

    head_size = draw(st.sampled_from([8, 16, 40]))
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
