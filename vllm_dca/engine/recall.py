"""How much of attention sparse prefill keeps, measured as it serves: for /metrics and the log.

A worker knows it, and vLLM's /metrics is another process: they meet in the folder that
PROMETHEUS_MULTIPROC_DIR names, where it is set.

Nothing waits for a device: the figures are on their way to the host while the step goes on, and
a later step counts those that have come.
"""

import functools
from collections import deque
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import torch
from prometheus_client import Histogram
from vllm.config import VllmConfig

from vllm_dca.engine.log import logger
from vllm_dca.engine.settings import settings_of
from vllm_dca.method.sparse import Attended

LABELS = ["model_name"]
SHARES = [0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
RECALLS = [0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 0.99, 1.0]


class _Metrics(NamedTuple):
    recall: Histogram
    keys: Histogram


@functools.cache
def _registered() -> _Metrics:
    """Once a process."""
    return _Metrics(
        Histogram(
            "vllm_dca:sparse_recall",
            "Share of a head's attention that sparse prefill kept, in sampled tiles.",
            LABELS,
            buckets=RECALLS,
        ),
        Histogram(
            "vllm_dca:sparse_keys",
            "Share of the keys that it kept for this.",
            LABELS,
            buckets=SHARES,
        ),
    )


class _Coming(NamedTuple):
    """Figures of a segment: recall and keys, [2, num_heads] on the host once `arrived`."""

    figures: torch.Tensor
    arrived: Callable[[], bool]
    observe: Callable[[torch.Tensor], None]


_coming: deque[_Coming] = deque()


def collect() -> None:
    """Count what has come since; the engine calls it at each step."""
    while _coming and _coming[0].arrived():
        coming = _coming.popleft()
        coming.observe(coming.figures)


def _to_host(figures: torch.Tensor) -> tuple[torch.Tensor, Callable[[], bool]]:
    """A copy that may still be on its way, and whether it has come."""
    if figures.device.type != "cuda":
        return figures, lambda: True
    there = torch.empty(figures.shape, dtype=figures.dtype, pin_memory=True)
    there.copy_(figures, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()
    return there, copied.query


class RecallWatch:
    """Counts what layers keep; warns once a process if that is under the user's bound."""

    warned: ClassVar[bool] = False

    def __init__(self, vllm_config: VllmConfig) -> None:
        sparse = settings_of(vllm_config).sparse
        assert sparse is not None
        self.bound = sparse.min_recall
        metrics = _registered()
        name = vllm_config.model_config.served_model_name
        self.recall, self.keys = metrics.recall.labels(name), metrics.keys.labels(name)

    def __call__(self, attended: Attended) -> None:
        """Look at a segment of a layer."""
        figures, arrived = _to_host(torch.stack(attended.kept(attended.lines)))
        count = functools.partial(self.count, attended.segment.end)
        _coming.append(_Coming(figures, arrived, count))

    def count(self, end: int, figures: torch.Tensor) -> None:
        """What a segment's heads kept, and of how many of the keys before `end`."""
        recall, keys = figures
        for histogram, of_heads in ((self.recall, recall), (self.keys, keys)):
            for share in of_heads.tolist():
                histogram.observe(share)
        if recall.mean() < self.bound and not RecallWatch.warned:
            RecallWatch.warned = True
            logger.warning(
                "DCA: sparse prefill kept %.3f of a layer's attention, with %.3f of the keys, "
                "at position %d; sparse_min_recall is %.3f. A larger sparse_coverage, or "
                "larger budgets, keep more.",
                recall.mean(),
                keys.mean(),
                end,
                self.bound,
            )
