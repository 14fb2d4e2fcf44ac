"""The specification of dense attention, against its table worked out by hand."""

import math

import pytest
import torch

from vllm_dca.reference.attention import dual_chunk_attention, rotate, temperature

# How far each query stands from each key, chunk by chunk: docs/architecture.md's table.
# Chunks of 3 and c = 4: keys stand at 0, 1, 2; both clamps are at c.
CLAMPED_AT_C = [
    [0],
    [1, 0],
    [2, 1, 0],
    [*(3, 2, 1), 0],  # r = 0: at 3
    [*(4, 3, 2), 1, 0],  # r = 1: at 4
    [*(4, 3, 2), 2, 1, 0],  # r = 2: at 5, clamped to 4
    [*(4, 3, 2), *(3, 2, 1), 0],  # the first chunk from 2s - 1 = 5, clamped to 4
    [*(4, 3, 2), *(4, 3, 2), 1, 0],
    [*(4, 3, 2), *(4, 3, 2), 2, 1, 0],
]
# Chunks of 2 and c = 4: the first chunk from 2s - 1 = 3, and no clamp.
NOT_CLAMPED = [
    [0],
    [1, 0],
    [*(2, 1), 0],
    [*(3, 2), 1, 0],
    [*(3, 2), *(2, 1), 0],
    [*(3, 2), *(3, 2), 1, 0],
]
# Queries (1, 0) on keys (2, 4 / sqrt(3)), turned by 60 degrees a position: at a distance d the
# product is 2 cos(60 d) + 4 sin(60 d) / sqrt(3).
PRODUCTS = {0: 2, 1: 3, 2: 1, 3: -2, 4: -3}
KEY = [2.0, 4 / math.sqrt(3)]


@pytest.mark.parametrize(
    ("chunk_size", "local_size", "distances"),
    [(4, 1, CLAMPED_AT_C), (4, 2, NOT_CLAMPED)],
    ids=["clamped at c", "not clamped"],
)
@pytest.mark.parametrize("original", [None, 2])
def test_the_table_by_hand(
    chunk_size: int, local_size: int, distances: list[list[int]], original: int | None
) -> None:
    """By a scale of ln 2 a key counts 2 to the power of its product; values say which key."""
    length = len(distances)
    query = torch.tensor([[[1.0, 0.0]]], dtype=torch.float64).repeat(length, 1, 1)
    key = torch.tensor([[KEY]], dtype=torch.float64).repeat(length, 1, 1)
    expected = torch.zeros(length, length, dtype=torch.float64)
    for i, row in enumerate(distances):
        power = 1 if original is None else max(1, 0.1 * math.log((i + 1) / original) + 1) ** 2
        counts = [2 ** (PRODUCTS[distance] * power) for distance in row]
        expected[i, : i + 1] = torch.tensor(counts, dtype=torch.float64) / sum(counts)
    for new in (length, 1, 2):  # the sequence's last ones
        found = dual_chunk_attention(
            query[-new:],
            key,
            torch.eye(length)[:, None],
            chunk_size=chunk_size,
            local_size=local_size,
            inv_freq=torch.tensor([math.pi / 3], dtype=torch.float64),
            scale=math.log(2),
            original_max_position_embeddings=original,
        )
        torch.testing.assert_close(found[:, 0], expected[-new:], rtol=0, atol=1e-14)


# Of two keys: their products 3 and 2 by a scale of ln 2 are ln 8 and ln 4.
@pytest.mark.parametrize(
    ("soft_cap", "counts"),
    # Scaled, then capped: tanh(ln 8) is 63/65, tanh(ln 4) is 15/17.
    [(None, [8.0, 4.0]), (1.0, [math.exp(63 / 65), math.exp(15 / 17)])],
)
def test_heads_caps_and_sinks_by_hand(soft_cap: float | None, counts: list[float]) -> None:
    """Four query heads on two of keys; a sink counts as a key does, uncapped, and is 0."""
    key = torch.tensor([KEY, [0.0, 0.0]], dtype=torch.float64).repeat(2, 1, 1)
    value = torch.stack([torch.eye(2), 10 * torch.eye(2)], dim=1)
    sinks = [4.0, 12.0, 2.0, 6.0]
    found = dual_chunk_attention(
        torch.tensor([[[1.0, 0.0]]]).repeat(1, 4, 1),
        key,
        value,
        chunk_size=4,
        local_size=1,
        inv_freq=torch.tensor([math.pi / 3], dtype=torch.float64),
        scale=math.log(2),
        soft_cap=soft_cap,
        sinks=torch.tensor(sinks, dtype=torch.float64).log(),
    )
    by_key = [[count / (sum(counts) + sink) for count in counts] for sink in sinks[:2]]
    by_nothing = [[10 / (2 + sink)] * 2 for sink in sinks[2:]]
    expected = torch.tensor([*by_key, *by_nothing], dtype=torch.float64)
    torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("is_neox", "expected"), [(True, [-3, -2, 1, -4, 5]), (False, [-2, 1, -3, -4, 5])]
)
def test_rotary_pairs_by_hand(is_neox: bool, expected: list[float]) -> None:
    """A quarter turn and a half turn, of the first and the second pair; the rest stays."""
    x = torch.tensor([[[1, 2, 3, 4, 5]]], dtype=torch.float64)
    frequencies = torch.tensor([math.pi / 2, math.pi], dtype=torch.float64)
    found = rotate(x, torch.tensor([1]), frequencies, is_neox)
    right = torch.tensor([[expected]], dtype=torch.float64)
    torch.testing.assert_close(found, right, rtol=0, atol=1e-14)


def test_the_temperature_by_hand() -> None:
    """(0.1 ln((i + 1) / 1000) + 1)^2, at least 1."""
    # At 1000, 2000 and 32000: ln 2 is 0.69314718056, and ln 32 five times that.
    found = temperature(torch.tensor([0, 999, 1999, 31999]), 1000)
    expected = torch.tensor([1, 1, 1.14343396625, 1.81326043404], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    assert temperature(torch.tensor([31999]), None).tolist() == [1]
