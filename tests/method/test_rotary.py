"""Tables of rotary positions."""

import pytest
import torch

from vllm_dca.method.rotary import longer_table, periodic_table

FREQUENCIES = 1e4 ** -(torch.arange(32, dtype=torch.float32) / 32)


def table(rows: int, mscale: float = 1.0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    angle = torch.outer(torch.arange(rows, dtype=dtype), FREQUENCIES.to(dtype))
    return (mscale * torch.cat([angle.cos(), angle.sin()], dim=-1)).float()


@pytest.mark.parametrize("mscale", [1.0, 1.2])
@pytest.mark.parametrize("rows", [2, 3, 129, 4096])
def test_a_longer_table_goes_on_as_it_began(rows: int, mscale: float) -> None:
    longer = longer_table(table(rows, mscale), 8 * rows)
    assert torch.equal(longer[:rows], table(rows, mscale))
    exact = table(8 * rows, mscale, torch.float64)
    # The entries of the last row of a power of two, in the table's second half, are right to 4
    # roundings: 3.5 of torch's cosine, half a one of the mscale. (Its angles are exact.) So is
    # the angle that is read off it, and the last row's is at most 16 times as far.
    atol = mscale * (16 * 4 + 1) * torch.finfo(torch.float32).eps
    torch.testing.assert_close(longer[rows:], exact[rows:], rtol=0, atol=atol)


def test_a_table_of_several_frequencies_each_is_refused() -> None:
    both = torch.cat([table(64), table(64)])
    with pytest.raises(ValueError, match="not one of constant frequencies"):
        longer_table(both, 256)


@pytest.mark.parametrize("rows", [3, 16, 17, 47, 48])
def test_a_periodic_table_has_a_row_of_each_position(rows: int) -> None:
    """Up to the last, which seldom ends a chunk."""
    own = table(20)
    periodic = periodic_table(own, 16, rows)
    assert torch.equal(periodic, own[torch.arange(rows) % 16])
    assert periodic.is_contiguous()
