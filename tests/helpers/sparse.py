"""Sparse prefill of a random batch in a paged cache, by the fast code and by the reference."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st

from tests.helpers.paged import Batch, query_start_loc
from vllm_dca.method.sparse_operations import SparsePlan
from vllm_dca.method.sparse_planning import Segment, sparse_segments
from vllm_dca.method.vertical_slash import Lines, Rule
from vllm_dca.reference import sparse as reference
from vllm_dca.reference.model import load, ordinary

# Of two heads.
RULES = st.one_of(
    st.builds(
        lambda v, s: Rule(torch.tensor(v), torch.tensor(s), 1.0, 0),
        *[st.lists(st.integers(0, 600), min_size=2, max_size=2)] * 2,
    ),
    st.builds(
        lambda share, least: Rule(None, None, share, least),
        st.floats(0.1, 1.0),
        st.sampled_from([0, 100, 1000]),
    ),
)


def plan(batch: Batch, threshold: int = 0) -> SparsePlan:
    """As the engine plans a step."""
    shape = batch.shape
    starts = query_start_loc(shape.lengths).numpy()
    ends = [total for total, _ in shape.lengths]
    segments = sparse_segments(starts, ends, shape.chunk_len, threshold)
    return SparsePlan(
        segments,
        batch.block_table,
        shape.geometry,
        shape.original_max_position_embeddings,
    )


def rest(batch: Batch, plan: SparsePlan) -> torch.Tensor:
    """[num_tokens] bool, those of no segment."""
    others = torch.ones(len(batch.rotated_query()), dtype=torch.bool)
    for segment in plan.segments:
        others[segment.rows] = False
    return others


def options(batch: Batch) -> dict[str, Any]:
    """What the reference wants to know beside queries, keys and values."""
    shape = batch.shape
    return {
        "chunk_size": shape.geometry.chunk_size,
        "local_size": shape.local_size,
        "inv_freq": batch.inv_freq,
        "is_neox": shape.is_neox,
        "scale": shape.scale,
        "original_max_position_embeddings": shape.original_max_position_embeddings,
    }


def unrotated(batch: Batch, segment: Segment) -> tuple[torch.Tensor, ...]:
    """A segment's queries, and the keys and values up to its end, for the reference."""
    shape, request = batch.shape, segment.request
    lengthen = torch.ones(shape.head_size, dtype=torch.float64)
    lengthen[: shape.rotary_dim] = shape.mscale
    cached = shape.lengths[request][1]
    return (
        batch.queries[request][segment.begin - cached : segment.end - cached] * lengthen,
        batch.keys[request][: segment.end] * lengthen,
        batch.values[request][: segment.end],
    )


def reference_rule(rule: Rule) -> reference.Rule:
    """The same for the reference, which shares no code with the rest."""
    budgets: Sequence[Any] = [
        None if each is None else each.tolist() for each in (rule.verticals, rule.slashes)
    ]
    return reference.Rule(*budgets, rule.coverage, rule.min_keys, rule.continuous)


def random_lines(batch: Batch, segment: Segment, share: float, seed: int = 0) -> Lines:
    """Any keys and distances, and a row's own key, which the band gives."""
    shape, generator = batch.shape, torch.Generator().manual_seed(seed)
    heads = shape.num_kv_heads * shape.group
    verticals = torch.rand(heads, segment.end, generator=generator) < share
    distances = torch.rand(heads, segment.end + 65, generator=generator) < share
    distances[:, 1:65] = True
    return Lines(verticals, distances)


def tied_weights(
    end: int, rule: Rule, seed: int
) -> tuple[tuple[torch.Tensor, torch.Tensor], reference.Lines]:
    """Sums along the lines of two heads, and which lines the reference takes by them.

    They are of whole numbers of 2^-20, which add up exactly, and of few different ones, so that
    many are equal.
    """
    generator = torch.Generator().manual_seed(seed)
    i = torch.arange(end - 64, end)[:, None]
    steps = torch.randint(0, 1 << (1 + seed % 12), (2, 64, end), generator=generator)
    weights = (steps * 2.0**-20).masked_fill(torch.arange(end) > i, 0.0)
    line = (i // rule.line_width - torch.arange(end) // rule.line_width).clamp(min=0)
    slash = torch.zeros(2, (end - 1) // rule.line_width + 1)
    slash.index_add_(1, line.flatten(), weights.flatten(1))
    right = reference.select(weights.double(), i[:, 0], reference_rule(rule))
    return (weights.sum(1), slash), right


def prompt_logprobs(
    model_dir: Path,
    tokens: list[int],
    *,
    steps: Sequence[int],
    threshold: int,
    rules: Sequence[reference.Rule | None],
    **sizes: Any,
) -> torch.Tensor:
    """Log-probability of every token but the first, given those before it, in fp64.

    A model by Hugging Face's code, its attention replaced by the reference. Layers with a
    window keep theirs.

    Args:
        model_dir: the checkpoint; queries and keys are rotated in halves.
        tokens: the sequence.
        steps: how many tokens each step of the engine took.
        threshold: the position from which attention is sparse.
        rules: of each layer.
        sizes: as of `dual_chunk_attention`.
    """

    def attention(
        module: Any, query: Any, key: Any, value: Any, mask: Any, **_: Any
    ) -> tuple[torch.Tensor, None]:
        query, key, value = (t[0].transpose(0, 1) for t in (query, key, value))
        if mask is not None:
            return ordinary(query, key, value, module.scaling, ~mask[0, 0])[None], None
        attended = reference.sparse_attention(
            *(_unrotated(each, cos, sin) for each in (query, key)),
            value,
            steps=steps,
            threshold=threshold,
            rule=rules[module.layer_idx],
            inv_freq=getattr(rotary, f"{prefix}inv_freq"),
            scale=module.scaling,
            **sizes,
        )
        return attended[None], None

    model = load(model_dir, attention, torch.float64)
    rotary = model.model.rotary_emb
    layer_type = ("full_attention",) if isinstance(rotary.rope_type, dict) else ()
    prefix = "".join(f"{each}_" for each in layer_type)
    x, positions = torch.zeros(1, dtype=torch.float64), torch.arange(len(tokens))[None]
    cos, sin = (each[0, :, None] for each in rotary(x, positions, *layer_type))
    with torch.inference_mode():
        logits = model(torch.tensor([tokens]), use_cache=False).logits[0]
    predicted = torch.tensor(tokens[1:])[:, None]
    return logits[:-1].log_softmax(-1).gather(1, predicted)[:, 0]


def _unrotated(turned: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Queries or keys, [num_tokens, num_heads, head_size], at position 0."""
    rotary, rest = turned.tensor_split([cos.shape[-1]], dim=-1)
    first, second = rotary.chunk(2, dim=-1)
    return torch.cat([rotary * cos + torch.cat([second, -first], dim=-1) * sin, rest], dim=-1)
