"""Pages cut into smaller ones: a slot keeps its number, and a page its bytes."""

import torch

from vllm_dca.method.kv_cache import split_kv, split_pages, write_kv

HEADS, SIZE = 2, 4


def test_a_slot_keeps_its_number() -> None:
    """What is stored in parts is read there by whole pages' slots, and nothing else changes."""
    cache = torch.full((5, HEADS, 6, 2 * SIZE), torch.nan)
    parts = split_pages(cache, 2)
    assert parts.shape == (15, HEADS, 2, 2 * SIZE)
    slots = torch.tensor([6, 9, 23])  # of pages 1, 1, 3
    key, value = torch.randn(2, len(slots), HEADS, SIZE)
    write_kv(key, value, parts, slots)
    keys, values = split_kv(parts)
    assert torch.equal(keys[slots // 2, slots % 2], key)
    assert torch.equal(values[slots // 2, slots % 2], value)
    assert (~cache.isnan()).flatten(1).sum(1).tolist() == [0, 32, 0, 16, 0]
    # Whoever zeroes a page by its number zeroes its parts, and no others.
    cache[1].zero_()
    assert (parts == 0).flatten(1).all(1).nonzero().flatten().tolist() == [3, 4, 5]


def test_pages_of_that_size_stay_as_they_are() -> None:
    cache = torch.empty(5, HEADS, 6, 2 * SIZE)
    assert split_pages(cache, 6) is cache
