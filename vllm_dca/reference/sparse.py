"""Sparse prefill by lines: which keys a query attends to, and how they are selected.

Two specifications in fp64, after MInference (Jiang et al. 2024) as Qwen's 1M checkpoints use
it, and after FlexPrefill (Lai et al. 2025). Attention over given lines is
`dual_chunk_attention` with what `seen_keys` says; the lines are selected, segment by segment,
by `select`.

Rows stand in tiles: row i's ends at E(i) = 64 (i // 64 + 1). A head attends from i to the keys
j <= i of which j is one of its verticals or E(i) - j one of its distances.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from vllm_dca.reference.attention import dual_chunk_attention, key_positions, rotate, scores

TILE = 64
PROBE = 64  # a segment's last rows, which its lines are selected from
FIRST_KEYS = 30  # the first keys, always seen
NEAR_DIAGONALS = 100  # the nearest diagonals, always seen
LEAST_ROWS = 256  # segments with fewer rows are dense


class Rule(NamedTuple):
    """How a layer's lines are selected.

    Attributes:
        verticals: [num_heads] how many keys; None for by `coverage`.
        slashes: [num_heads] how many diagonals; None likewise.
        coverage: share of the weights that the verticals cover, and the blocks as well.
        min_keys: at least as many verticals, and as many keys in blocks.
        continuous: positions that weights are computed with, see `query_positions`.
    """

    verticals: Sequence[int] | None = None
    slashes: Sequence[int] | None = None
    coverage: float = 1.0
    min_keys: int = 0
    continuous: bool = False


class Lines(NamedTuple):
    """What the heads attend to in a segment that ends at `end`.

    Attributes:
        verticals: [num_heads, end] bool, by key.
        distances: [num_heads, end + TILE + 1] bool, by the distance from a tile's end.
    """

    verticals: torch.Tensor
    distances: torch.Tensor


def seen_keys(i: torch.Tensor, lines: Lines) -> torch.Tensor:
    """[num_heads, num_rows, num_keys] bool, the keys that the rows at positions i attend to."""
    j = torch.arange(lines.verticals.shape[1])
    distance = TILE * (i[:, None] // TILE + 1) - j
    seen = lines.verticals[:, None, :] | lines.distances[:, distance.clamp(min=0)]
    return seen & (j <= i[:, None])


def select(weights: torch.Tensor, i: torch.Tensor, rule: Rule) -> Lines:
    """The lines that hold the largest part of the weights; of equal ones, the first.

    By budgets: single diagonals, each of which gives a tile the keys that any of its rows has
    on it. By coverage: blocks of 64 distances from a tile's end, the fewest that have their
    share.

    Args:
        weights: [num_heads, num_rows, end], attention from a segment's last rows.
        i: [num_rows] their absolute positions; the last is end - 1.
        rule: of the layer.
    """
    num_heads, _, end = weights.shape
    j = torch.arange(end)
    always = torch.arange(end) < FIRST_KEYS
    by_budget = rule.verticals is not None
    # A line is a diagonal, or a block of them in tiles.
    line = i[:, None] - j if by_budget else i[:, None] // TILE - j // TILE
    last = int(line.max()) + 1
    # A block's nearest diagonal is that of a tile's first row.
    reach = torch.arange(last) if by_budget else TILE * torch.arange(last) - (TILE - 1)
    nearest = reach < NEAR_DIAGONALS
    verticals, slashes = [], []
    for head in range(num_heads):
        vertical = weights[head].sum(0)
        slash = torch.zeros(last, dtype=weights.dtype)
        # What is behind a row weighs nothing.
        slash.index_add_(0, line.clamp(min=0).flatten(), weights[head].flatten())
        if rule.verticals is not None and rule.slashes is not None:
            counts = rule.verticals[head], rule.slashes[head]
        else:
            counts = (
                max(_cover(vertical, always, rule.coverage), rule.min_keys),
                max(_cover(slash, nearest, rule.coverage), -(-rule.min_keys // TILE)),
            )
        verticals.append(_largest(vertical, always, counts[0]))
        slashes.append(_largest(slash, nearest, counts[1]))
    distances = torch.zeros(num_heads, end + TILE + 1, dtype=torch.bool)
    for head, chosen in enumerate(slashes):
        for d in chosen.nonzero().flatten().tolist():
            first = (d if by_budget else TILE * d) + 1
            distances[head, first : first + TILE] = True
    return Lines(torch.stack(verticals), distances)


def _order(weight: torch.Tensor, always: torch.Tensor) -> torch.Tensor:
    """What is always taken, then the largest first; of equal ones, the first."""
    return weight.masked_fill(always, torch.inf).sort(descending=True, stable=True).indices


def _cover(weight: torch.Tensor, always: torch.Tensor, share: float) -> int:
    """The fewest that have this share of the whole, in their order."""
    covered = weight[_order(weight, always)].cumsum(0)
    return int((covered < share * weight.sum()).sum()) + 1


def _largest(weight: torch.Tensor, always: torch.Tensor, count: int) -> torch.Tensor:
    chosen = always.clone()
    chosen[_order(weight, always)[:count]] = True
    return chosen


def segments(steps: Sequence[int], chunk_len: int, threshold: int) -> list[tuple[int, int]]:
    """Where a sequence is cut, by first row and end; see `is_sparse`.

    Args:
        steps: how many tokens each step of the engine took, one after the other.
        chunk_len: s.
        threshold: the position from which attention is sparse.
    """
    ends = torch.tensor(steps).cumsum(0).tolist()
    inside = [*range(chunk_len, ends[-1], chunk_len), threshold]
    cuts = sorted({0, *ends, *(cut for cut in inside if cut < ends[-1])})
    return list(itertools.pairwise(cuts))


def is_sparse(begin: int, end: int, threshold: int) -> bool:
    """Whether a segment is sparse: past the threshold, and worth it."""
    return begin >= threshold and end - begin >= LEAST_ROWS


def sparse_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    steps: Sequence[int],
    threshold: int,
    rule: Rule,
    chunk_size: int,
    local_size: int,
    inv_freq: torch.Tensor,
    is_neox: bool = True,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> torch.Tensor:
    """A whole sequence, as an engine prefills it in steps.

    Args:
        query: [seq_len, num_heads, head_size], unrotated.
        key: [seq_len, num_kv_heads, head_size], unrotated.
        value: [seq_len, num_kv_heads, head_size].
        steps: see `segments`; their sum is seq_len.
        threshold: the position from which attention is sparse.
        rule: how lines are selected.
        options: these and the rest as of `dual_chunk_attention`.

    Returns:
        [seq_len, num_heads, head_size] in `dtype`.
    """
    sizes: dict[str, Any] = {
        "chunk_size": chunk_size,
        "local_size": local_size,
        "inv_freq": inv_freq,
        "is_neox": is_neox,
        **options,
    }
    outputs = []
    for begin, end in segments(steps, chunk_size - local_size, threshold):
        seen = None
        if is_sparse(begin, end, threshold):
            probe = torch.arange(end - PROBE, end)
            weights = probe_weights(query[probe], key[:end], rule, dtype=dtype, **sizes)
            seen = seen_keys(torch.arange(begin, end), select(weights, probe, rule))
        outputs.append(
            dual_chunk_attention(
                query[begin:end], key[:end], value[:end], seen=seen, dtype=dtype, **sizes
            )
        )
    return torch.cat(outputs)


def probe_weights(
    query: torch.Tensor,
    key: torch.Tensor,
    rule: Rule,
    *,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> torch.Tensor:
    """Attention from a sequence's last rows: [num_heads, num_rows, seq_len], a softmax each.

    Args:
        query: [num_rows, num_heads, head_size], unrotated.
        key: [seq_len, num_kv_heads, head_size], unrotated.
        rule: whose positions are used.
        dtype: of the arithmetic.
        options: as of `vllm_dca.reference.attention.scores`.
    """
    positions = key_positions(
        torch.arange(len(key)), options["chunk_size"], options["local_size"]
    )
    inv_freq, is_neox = options["inv_freq"].double(), options.get("is_neox", True)
    key = rotate(key.to(dtype), positions, inv_freq, is_neox).to(dtype)
    i = torch.arange(len(key) - len(query), len(key))
    found = scores(query.to(dtype), key, i, continuous=rule.continuous, **options)
    return torch.stack([of_head.softmax(-1) for of_head in found])
