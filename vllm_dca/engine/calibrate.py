"""Budgets of sparse prefill for any model, from how much of attention they keep in a text.

The text is read once, densely. After each segment every pair of budgets of a grid says what it
would have kept of a tile between, whose rows select nothing.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vllm_dca.method.lines import Rule
from vllm_dca.method.sparse import Attended
from vllm_dca.method.sparse_config import KIND


class Budget(NamedTuple):
    """Of a head, and what it kept in the text.

    Attributes:
        verticals: how many.
        slashes: how many.
        recall: share of attention, the mean of all segments.
        keys: share of keys, likewise.
    """

    verticals: int
    slashes: int
    recall: float
    keys: float


class Grid:
    """What every pair of budgets kept in the segments of a layer.

    Args:
        length: of the text, in tokens; no budget is larger.
        seen: called after each segment.
    """

    def __init__(self, length: int, seen: Callable[[], None]) -> None:
        sizes = [2**n for n in range(5, length.bit_length()) if 2**n < length]
        self.pairs = [(v, s) for v in sizes[::2] for s in (*sizes[2:], length)]
        self.totals: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.segments = 0
        self.seen = seen

    def __call__(self, attended: Attended) -> None:
        """Look at a segment."""
        heads = attended.query.shape[1]
        found = []
        weights = None
        for verticals, slashes in self.pairs:
            rule = Rule(torch.full((heads,), verticals), torch.full((heads,), slashes), 1.0, 0)
            weights = weights or attended.weigh(rule)
            found.append(attended.kept(attended.operations.select(*weights, rule)))
        if self.totals:
            found = [
                (recall + more, keys + others)
                for (recall, keys), (more, others) in zip(self.totals, found, strict=True)
            ]
        self.totals = found
        self.segments += 1
        self.seen()

    def budgets(self, recall: float) -> list[Budget]:
        """Of each head: the fewest keys that keep this share of attention, else the best."""
        recalls, keys = (
            torch.stack(column) / self.segments for column in zip(*self.totals, strict=True)
        )
        enough = recalls >= recall
        # Where nothing is enough, the best.
        cost = torch.where(enough.any(0), keys.masked_fill(~enough, torch.inf), -recalls)
        chosen = cost.argmin(0).tolist()
        return [
            Budget(
                verticals=self.pairs[index][0],
                slashes=self.pairs[index][1],
                recall=recalls[index, head].item(),
                keys=keys[index, head].item(),
            )
            for head, index in enumerate(chosen)
        ]


def calibrate(
    model: str, text: Path, recall: float, given: dict[str, Any], seen: Callable[[int], None]
) -> dict[int, list[Budget]]:
    """Budgets of each layer that DCA attends, by its number.

    Args:
        model: a checkpoint's directory or name.
        text: a file; its first max_model_len - 1 tokens are read.
        recall: the share of attention that each head is to keep.
        given: the engine's options; those of DCA are taken from there too.
        seen: called after each segment of a layer, with the number of layers.

    Raises:
        ValueError, NotImplementedError, OSError: as a start would; or nothing was sparse.
    """
    # The engine in this process, where its layers can be watched.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams
    from vllm.model_executor.models.utils import extract_layer_index

    from vllm_dca.engine.impl import DcaImpl
    from vllm_dca.engine.metadata import DcaMetadataBuilder

    DcaMetadataBuilder.watched_steps = 1
    additional = given.pop("additional_config", {})
    # All lines: dense.
    every = {"sparse": "auto", "sparse_min_keys": 1 << 30}
    llm = LLM(
        model,
        attention_backend="dca",
        additional_config={**additional, "dca": {**additional.get("dca", {}), **every}},
        enable_prefix_caching=False,
        enforce_eager=True,
        **given,
    )
    config = llm.llm_engine.vllm_config
    tokens = llm.get_tokenizer().encode(text.read_text())[
        : config.model_config.max_model_len - 1
    ]
    grids: dict[int, Grid] = {}
    layers = config.compilation_config.static_forward_context
    for name, layer in layers.items():
        impl = getattr(layer, "impl", None)
        if isinstance(impl, DcaImpl) and impl.rule is not None:
            grid = Grid(len(tokens), lambda: seen(len(grids)))
            grids[extract_layer_index(name)] = impl.watch = grid
    params = SamplingParams(max_tokens=1, detokenize=False)
    llm.generate([{"prompt_token_ids": tokens}], params, use_tqdm=False)
    if not all(grid.segments for grid in grids.values()):
        raise ValueError(
            f"{text} has {len(tokens)} tokens for this model, of which no step was sparse: "
            "give a longer text, or a smaller sparse_threshold."
        )
    return {layer: grid.budgets(recall) for layer, grid in sorted(grids.items())}


def as_config(budgets: dict[int, list[Budget]]) -> list[dict[str, list[Any]]]:
    """What a sparse_attention_config.json holds: by layer and head, its recall as the score."""
    return [
        {
            str(head): [KIND, each.verticals, each.slashes, round(each.recall, 4)]
            for head, each in enumerate(budgets.get(layer, []))
        }
        for layer in range(max(budgets) + 1)
    ]
