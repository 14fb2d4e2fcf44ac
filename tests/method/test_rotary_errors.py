"""What a model's rotary table must reach, in words that say what would do."""

import re

import pytest
import torch

from vllm_dca.method.rotary import periodic_table, unit_table

TABLE = torch.cat([torch.ones(10, 2), torch.zeros(10, 2)], dim=-1)


def test_a_table_shorter_than_a_chunk() -> None:
    assert len(periodic_table(TABLE, 10, 25)) == 25
    message = (
        "10 positions, fewer than the chunk length 11. Choose chunk_size - local_size <= 10."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        periodic_table(TABLE, 11, 25)


def test_a_table_shorter_than_the_furthest_turn() -> None:
    """Its next row is worked out, and no further one."""
    assert len(unit_table(TABLE, 10)) == 11
    message = "10 positions, fewer than chunk_size=11. Choose a chunk_size up to 10."
    with pytest.raises(ValueError, match=re.escape(message)):
        unit_table(TABLE, 11)
