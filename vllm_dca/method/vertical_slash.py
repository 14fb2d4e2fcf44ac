"""Which keys a head attends to in a sparse segment: verticals and distances.

`vllm_dca.reference.sparse` says what these are; here they are selected for all heads at once.
"""

from typing import NamedTuple

import torch

from vllm_dca.method.sparse_config import TILE, SparseSettings

PROBE = TILE  # a segment's last rows, which its lines are selected from
FIRST_KEYS = 30  # the first keys, always seen
NEAR_DIAGONALS = 100  # the nearest diagonals, always seen


class Rule(NamedTuple):
    """How a layer's lines are selected: by budgets, else by coverage.

    Attributes:
        verticals: [num_heads] int64, how many keys; None for by coverage.
        slashes: [num_heads] int64, how many diagonals; None likewise.
        coverage: share of the weights that the verticals cover, and the blocks as well.
        min_keys: at least as many verticals, and as many keys in blocks.
    """

    verticals: torch.Tensor | None
    slashes: torch.Tensor | None
    coverage: float
    min_keys: int

    def to(self, device: torch.device) -> "Rule":
        """With its budgets there."""
        if self.verticals is None or self.slashes is None:
            return self
        return self._replace(
            verticals=self.verticals.to(device), slashes=self.slashes.to(device)
        )

    @property
    def line_width(self) -> int:
        """Diagonals of a row, or of a tile, that are weighed together."""
        return TILE if self.slashes is None else 1

    @property
    def continuous(self) -> bool:
        """Whether weights have positions without DCA's clamps, as Qwen's budgets want it."""
        return self.slashes is not None


def rule_of(settings: SparseSettings, layer: int, heads: slice) -> Rule:
    """How one layer's lines are selected.

    Args:
        settings: of the model.
        layer: its number, which the budgets go by.
        heads: those of this rank, among the model's query heads.

    Returns:
        The rule; with budgets it has two [num_heads] int64 tensors on the CPU.
    """
    verticals = slashes = None
    if settings.budgets is not None:
        verticals, slashes = torch.tensor(settings.budgets[layer][heads]).T.contiguous()
    return Rule(verticals, slashes, settings.coverage, settings.min_keys)


class Lines(NamedTuple):
    """What the heads attend to in a segment that ends at `end`.

    Attributes:
        verticals: [num_heads, end] bool, by key.
        distances: [num_heads, end + TILE + 1] bool, by how far a key is from its row's tile's
            end.
    """

    verticals: torch.Tensor
    distances: torch.Tensor


def select(vertical: torch.Tensor, slash: torch.Tensor, rule: Rule) -> Lines:
    """The lines of the largest weight; of equal ones, the first.

    Args:
        vertical: [num_heads, end], weight of each key.
        slash: [num_heads, num_lines], weight of each diagonal, or of each block of them: 64
            distances from the end of a row's tile.
        rule: of the layer.
    """
    num_heads, end = vertical.shape
    width = rule.line_width
    always = torch.arange(end, device=vertical.device) < FIRST_KEYS
    line = torch.arange(slash.shape[1], device=slash.device) * width
    near = line - (width - 1) < NEAR_DIAGONALS
    keys = _largest(vertical, always, rule.verticals, rule.min_keys, rule.coverage)
    lines = _largest(slash, near, rule.slashes, -(-rule.min_keys // width), rule.coverage)
    distances = vertical.new_zeros(num_heads, end + TILE + 1, dtype=torch.bool)
    if width == TILE:
        spread = lines.repeat_interleave(TILE, dim=1)[:, : end + TILE]
        distances[:, 1 : 1 + spread.shape[1]] = spread
    else:
        # A diagonal d is at the distances d + 1 .. d + TILE.
        distances[:, 1:] = _within(lines, end)
    return Lines(keys, distances)


def _within(lines: torch.Tensor, end: int) -> torch.Tensor:
    """[num_heads, end + TILE], whether it or one of the TILE - 1 lines before it is chosen."""
    padded = torch.nn.functional.pad(lines.int(), (TILE, TILE + end - lines.shape[1]))
    begun = padded.cumsum(1, dtype=torch.int32)
    return begun[:, TILE:] > begun[:, :-TILE]


def _largest(
    weight: torch.Tensor,
    always: torch.Tensor,
    counts: torch.Tensor | None,
    least: int,
    coverage: float,
) -> torch.Tensor:
    """Which are taken: what always is, then the largest, up to a count or a share."""
    forced = weight.masked_fill(always, torch.inf)
    order = forced.sort(dim=1, descending=True, stable=True).indices
    if counts is None:
        covered = weight.gather(1, order).double().cumsum(1)
        needed = coverage * covered[:, -1:]
        counts = (covered < needed).sum(1).add_(1).clamp_(min=least)
    counts = counts.to(weight.device)
    rank = torch.arange(weight.shape[1], device=weight.device)
    taken = rank < counts[:, None]
    return torch.zeros_like(taken).scatter_(1, order, taken) | always
