"""Budgets of sparse prefill for any model, from how much of attention they keep in a text.

The text is read once, densely. After each segment, every pair of budgets of a grid reports how
much attention it would have kept for a tile in the segment's middle, whose rows select nothing.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from vllm import LLM, SamplingParams
from vllm.config import VllmConfig
from vllm.model_executor.models.utils import extract_layer_index

from vllm_dca.engine.impl import DcaImpl
from vllm_dca.engine.settings import OPTIONS
from vllm_dca.method.config import validate_options
from vllm_dca.method.sparse_config import (
    AUTO,
    BUDGETS_KEY,
    CHECKPOINT,
    COVERAGE_KEY,
    KIND,
    MIN_KEYS_KEY,
    MODE_KEY,
)
from vllm_dca.method.sparse_recall import Attended
from vllm_dca.method.vertical_slash import Rule


class Budget(NamedTuple):
    """A head's budget, and what it kept in the text.

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
    """

    def __init__(self, length: int) -> None:
        sizes = [2**n for n in range(5, length.bit_length()) if 2**n < length]
        self.pairs = [(v, s) for v in sizes[::2] for s in (*sizes[2:], length)]
        self.totals: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.segments = 0

    def __call__(self, attended: Attended) -> None:
        """Look at a segment."""
        heads = attended.query.shape[1]
        rules = [
            Rule(torch.full((heads,), verticals), torch.full((heads,), slashes), 1.0, 0)
            for verticals, slashes in self.pairs
        ]
        # No weight depends on how many lines are kept. They are copied: a device may weigh the
        # tile in between in the same memory.
        vertical, slash = (each.clone() for each in attended.weigh(rules[0]))
        found = [attended.kept(attended.select(vertical, slash, rule)) for rule in rules]
        if self.totals:
            found = [
                (recall + more, keys + others)
                for (recall, keys), (more, others) in zip(self.totals, found, strict=True)
            ]
        self.totals = found
        self.segments += 1

    def budgets(self, recall: float) -> list[Budget]:
        """For each head the fewest keys that keep this share of attention, else the best."""
        recalls, keys = (
            torch.stack(column) / self.segments for column in zip(*self.totals, strict=True)
        )
        # Where all is kept it is 1 but for rounding.
        enough = recalls >= recall - 1e-6
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


class Calibration:
    """The worker's part, which vLLM mixes into its worker's class (worker_extension_cls)."""

    vllm_config: VllmConfig
    dca_grids: dict[int, Grid]

    def watch_dca(self, length: int) -> None:
        """Look at each sparse segment from now on, in all layers."""
        self.dca_grids = {}
        layers = self.vllm_config.compilation_config.static_forward_context
        for name, layer in layers.items():
            impl = getattr(layer, "impl", None)
            if isinstance(impl, DcaImpl) and impl.sparse is not None:
                impl.sparse.sampler.every = 1
                grid = Grid(length)
                self.dca_grids[extract_layer_index(name)] = impl.sparse.watch = grid

    def dca_budgets(self, recall: float) -> dict[int, list[Budget]]:
        """Budgets of this rank's layers and heads; empty if nothing was sparse."""
        return {
            layer: grid.budgets(recall)
            for layer, grid in self.dca_grids.items()
            if grid.segments
        }


def calibrate(
    model: str, text: Path, recall: float, given: dict[str, Any], seen: Callable[[int], None]
) -> dict[int, list[Budget]]:
    """Budgets of each layer that DCA attends, by its number.

    Args:
        model: a checkpoint's directory or name.
        text: a file; its first max_model_len - 1 tokens are read.
        recall: the share of attention that each head is to keep.
        given: the engine's options; those of DCA are taken from there too. The text is read
            once, eagerly, and nothing is drafted, whatever they say of that.
        seen: called after each step, with the number of steps.

    Raises:
        ValueError, NotImplementedError, OSError: as a start would; or nothing was sparse.
        RuntimeError: the engine failed.
    """
    # Before the engine, which takes minutes to start.
    try:
        content = text.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{text} is not UTF-8 text: {error}") from error
    additional = given.get("additional_config", {})
    options = additional.get(OPTIONS, {})
    if isinstance(options, dict):
        # Those of an earlier calibration are for the mode that it printed with them.
        options = {key: value for key, value in options.items() if key != BUDGETS_KEY}
        # All lines: dense.
        options |= {MODE_KEY: AUTO, MIN_KEYS_KEY: 1 << 30}
    validate_options(options)
    own = {
        "attention_backend": "dca",
        "additional_config": {**additional, OPTIONS: options},
        "worker_extension_cls": f"{Calibration.__module__}.{Calibration.__qualname__}",
        "enable_prefix_caching": False,
        "enforce_eager": True,
        "speculative_config": None,
    }
    # The engine in this process, so that its steps can be counted.
    with mock.patch.dict(os.environ, VLLM_ENABLE_V1_MULTIPROCESSING="0"):
        llm = LLM(model, **{**given, **own})
    try:
        config = llm.llm_engine.vllm_config
        tokens = llm.get_tokenizer().encode(content)[: config.model_config.max_model_len - 1]
        llm.collective_rpc("watch_dca", args=(len(tokens),))
        params = SamplingParams(max_tokens=1, detokenize=False)
        llm.enqueue([{"prompt_token_ids": tokens}], params, use_tqdm=False)
        steps = -(-len(tokens) // config.scheduler_config.max_num_batched_tokens)
        while llm.llm_engine.has_unfinished_requests():
            llm.llm_engine.step()
            seen(steps)
        ranks = llm.collective_rpc("dca_budgets", args=(recall,))
    finally:
        # Workers of other ranks are processes of their own.
        llm.llm_engine.engine_core.shutdown()
    if not any(ranks):
        raise ValueError(
            f"{text} has {len(tokens)} tokens for this model, of which no step was sparse: "
            "give a longer text, a larger --max-model-len, or a smaller sparse_threshold."
        )
    # A layer's heads are cut by rank, in order.
    budgets: dict[int, list[Budget]] = {}
    for of_rank in ranks:
        for layer, heads in of_rank.items():
            budgets.setdefault(layer, []).extend(heads)
    return dict(sorted(budgets.items()))


def with_budgets(additional: dict[str, Any], budgets: Path) -> dict[str, Any]:
    """The `--additional-config` that uses budgets, from the one they were found with."""
    options = {
        key: value
        for key, value in additional.get(OPTIONS, {}).items()
        if key not in (MODE_KEY, COVERAGE_KEY, MIN_KEYS_KEY)
    }
    options |= {MODE_KEY: CHECKPOINT, BUDGETS_KEY: str(budgets.resolve())}
    return {**additional, OPTIONS: options}


def as_config(budgets: dict[int, list[Budget]]) -> list[dict[str, list[Any]]]:
    """What a sparse_attention_config.json holds: by layer and head, its recall as the score."""
    return [
        {
            str(head): [KIND, each.verticals, each.slashes, round(each.recall, 4)]
            for head, each in enumerate(budgets.get(layer, []))
        }
        for layer in range(max(budgets) + 1)
    ]
