"""How much of attention sparse prefill keeps, measured as it serves: for /metrics and the log.

A worker knows it, and vLLM's /metrics is another process: they meet in the folder that
PROMETHEUS_MULTIPROC_DIR names, where it is set.

Nothing waits for a device: the figures are on their way to the host while the step goes on, and
a later step counts those that have come.
"""

import functools
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import torch
from prometheus_client import Histogram
from vllm.config import VllmConfig

from vllm_dca.engine.log import logger
from vllm_dca.engine.settings import settings_of
from vllm_dca.method.sparse_recall import Attended

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

    end: int
    figures: torch.Tensor
    arrived: Callable[[], bool]


class RecallSampler:
    """Has layers look at one in so many steps with sparse segments, and counts what they saw.

    All layers of a model share it. It warns once if they keep less than the user's bound.

    Attributes:
        every: one in so many steps.
    """

    def __init__(self, vllm_config: VllmConfig, every: int = 16) -> None:
        sparse = settings_of(vllm_config).sparse
        assert sparse is not None
        self.every = every
        self._bound = sparse.min_recall
        self._steps, self._has_warned = 0, False
        self._coming: deque[_Coming] = deque()
        metrics = _registered()
        name = vllm_config.model_config.served_model_name
        self._recall, self._keys = metrics.recall.labels(name), metrics.keys.labels(name)

    def takes_next_step(self) -> bool:
        """Whether layers are to look at the next step; the first one is looked at.

        The layers of several KV cache groups ask in turns, so that the same place in each run
        of `every` steps could always be the same group's: the place moves on.
        """
        run, place = divmod(self._steps, self.every)
        self._steps += 1
        return place == run % self.every

    def watch(self, attended: Attended) -> None:
        """Look at a segment of a layer."""
        figures, arrived = _to_host(torch.stack(attended.kept(attended.lines)))
        self._coming.append(_Coming(attended.segment.end, figures, arrived))

    def collect(self) -> None:
        """Count what has come since; called at each step."""
        while self._coming and self._coming[0].arrived():
            self._count(self._coming.popleft())

    def _count(self, coming: _Coming) -> None:
        recall, keys = coming.figures
        for histogram, of_heads in ((self._recall, recall), (self._keys, keys)):
            for share in of_heads.tolist():
                histogram.observe(share)
        if recall.mean() < self._bound and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "DCA: sparse prefill kept %.3f of a layer's attention, with %.3f of the keys, "
                "at position %d; sparse_min_recall is %.3f. A larger sparse_coverage, or "
                "larger budgets, keep more.",
                recall.mean(),
                keys.mean(),
                coming.end,
                self._bound,
            )


def _to_host(figures: torch.Tensor) -> tuple[torch.Tensor, Callable[[], bool]]:
    """A copy that may still be on its way, and whether it has come."""
    if figures.device.type != "cuda":
        return figures, lambda: True
    there = torch.empty(figures.shape, dtype=figures.dtype, pin_memory=True)
    there.copy_(figures, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()
    return there, copied.query
