"""Asked of an engine's workers through `LLM.apply_model`: how sparse prefill selects, what it
keeps, and what attention takes.

A module of its own, because vLLM passes its functions on by name.
"""

import functools
import statistics
import time
from typing import Any, NamedTuple

import torch

from vllm_dca.engine.impl import DcaImpl
from vllm_dca.engine.metadata import DcaMetadataBuilder
from vllm_dca.method.sparse_config import TILE
from vllm_dca.method.sparse_operations import SparseOperations
from vllm_dca.method.sparse_planning import Segment
from vllm_dca.method.sparse_recall import Attended
from vllm_dca.method.vertical_slash import Lines, Rule

FIRST = 64  # keys, which a window keeps beside the nearest ones


class Selection(NamedTuple):
    """How keys are selected.

    Attributes:
        coverage: of `auto`; None for dense attention.
        window: take as many keys of each head as `auto` would, but the first and the nearest.
    """

    coverage: float | None
    window: bool = False

    @property
    def label(self) -> str:
        """As records have it."""
        if self.coverage is None:
            return "dense"
        return f"{'window' if self.window else 'auto'} {self.coverage:g}"

    @classmethod
    def parse(cls, label: str) -> "Selection":
        """From such a label.

        Raises:
            ValueError: it is no label.
        """
        match label.split():
            case ["dense"]:
                return cls(None)
            case ["auto" | "window" as kind, share]:
                return cls(float(share), kind == "window")
        raise ValueError(f"{label!r} is none of: dense, auto COVERAGE, window COVERAGE")


class SinkAndWindow:
    """As many keys as `auto` takes of each head, but the first ones and the nearest.

    As many in the middle of a segment: there it is measured what lines keep.
    """

    def __init__(self, operations: SparseOperations) -> None:
        self.own = operations
        self.middle = 0

    def operations(self) -> SparseOperations:
        return self.own._replace(weigh=self._weigh, select=self._select)

    def _weigh(self, *args: Any, segment: Segment, **kwargs: Any) -> Any:
        self.middle = (segment.begin + segment.end) // 2 // TILE * TILE
        return self.own.weigh(*args, segment=segment, **kwargs)

    def _select(self, vertical: torch.Tensor, slash: torch.Tensor, rule: Rule) -> Lines:
        lines, middle = self.own.select(vertical, slash, rule), self.middle
        near = lines.distances[:, 1 : middle + 1].flip(1)
        count = (lines.verticals[:, :middle] | near).sum(1, keepdim=True)
        distance = torch.arange(lines.distances.shape[1])
        first = torch.arange(lines.verticals.shape[1]) < FIRST
        return Lines(first.repeat(len(count), 1), (distance > 0) & (distance <= count - FIRST))


class Watched:
    """A layer, what its attention took, and what it kept."""

    def __init__(self, impl: DcaImpl) -> None:
        assert impl.sparse is not None
        self.sparse, self.forward = impl.sparse, impl.forward
        self.rule, self.prefill = impl.sparse.rule, impl.sparse.prefill
        self.seconds = 0.0
        self.segments: list[tuple[int, float, torch.Tensor, torch.Tensor]] = []
        impl.forward = self._timed  # type: ignore[method-assign]
        impl.sparse.watch = self._look
        impl.sparse.sampler.every = 1

    def use(self, selection: Selection) -> None:
        """From now on; what was seen before is forgotten."""
        self.seconds, self.segments = 0.0, []
        if selection.coverage is None:
            return
        self.sparse.rule = self.rule._replace(coverage=selection.coverage)
        self.sparse.prefill = self.prefill
        if selection.window:
            # As `vllm_dca.method.sparse_prefill.by_segment` made it.
            attend: Any = self.prefill.attend
            operations = SinkAndWindow(attend.keywords["operations"]).operations()
            by_window = functools.partial(attend.func, operations=operations)
            self.sparse.prefill = self.prefill._replace(attend=by_window)

    def _timed(self, *args: Any, **kwargs: Any) -> Any:
        start = time.process_time()
        try:
            return self.forward(*args, **kwargs)
        finally:
            self.seconds += time.process_time() - start

    def _look(self, attended: Attended) -> None:
        start = time.process_time()
        recall, keys = attended.kept(attended.lines)
        begin, end = attended.segment.begin, attended.segment.end
        self.segments.append((end - begin, (begin + end) / 2, recall, keys))
        self.seconds -= time.process_time() - start

    def kept(self) -> tuple[float, list[float]]:
        """The share of keys, and of each head's attention, over all rows that were sparse."""
        pairs = sum(rows * middle for rows, middle, *_ in self.segments)
        keys = sum(rows * middle * keys.mean() for rows, middle, _, keys in self.segments)
        rows = sum(rows for rows, *_ in self.segments)
        recall = sum(rows * recall for rows, _, recall, _ in self.segments) / rows
        return float(keys / pairs), recall.tolist()


_SPLIT = DcaMetadataBuilder.split


def _nothing(*_: Any) -> None:
    """No sparse segments."""


def _layers(model: torch.nn.Module) -> list[Watched]:
    """Each of DCA's, watched from the first time on."""
    found = []
    for module in model.modules():
        impl = getattr(module, "impl", None)
        if isinstance(impl, DcaImpl):
            known = getattr(impl.sparse and impl.sparse.watch, "__self__", None)
            found.append(known if isinstance(known, Watched) else Watched(impl))
    return found


def use(model: torch.nn.Module, label: str) -> None:
    """Select in this way from now on, and look at every step."""
    selection = Selection.parse(label)
    # The builder plans a step densely if nothing of it is split off.
    split = _SPLIT if selection.coverage is not None else _nothing
    DcaMetadataBuilder.split = split  # type: ignore[method-assign, assignment]
    for layer in _layers(model):
        layer.use(selection)


def kept(model: torch.nn.Module) -> dict[str, Any]:
    """Since `use`: what attention took, and shares of keys and of attention, by layer."""
    layers = _layers(model)
    found: dict[str, Any] = {
        "attention_seconds": round(sum(layer.seconds for layer in layers), 2)
    }
    if not any(layer.segments for layer in layers):
        return found
    keys, recalls = zip(*(layer.kept() for layer in layers), strict=True)
    every = [recall for of_layer in recalls for recall in of_layer]
    by_layer = {
        "keys": list(keys),
        "recall": [statistics.fmean(of_layer) for of_layer in recalls],
        "least recall of a head": [min(of_layer) for of_layer in recalls],
    }
    return found | {
        "keys": round(statistics.fmean(keys), 4),
        "recall": round(statistics.fmean(every), 4),
        "layers": {what: [round(of, 3) for of in each] for what, each in by_layer.items()},
    }
