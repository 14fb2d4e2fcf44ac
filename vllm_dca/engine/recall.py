"""How much of attention sparse prefill keeps, measured as it serves: for /metrics and the log.

A worker knows it, and vLLM's /metrics is another process: they meet in the folder that
PROMETHEUS_MULTIPROC_DIR names, where it is set.
"""

import functools
from typing import ClassVar, NamedTuple

from prometheus_client import Histogram
from vllm.config import VllmConfig
from vllm.logger import init_logger

from vllm_dca.engine.settings import settings_of
from vllm_dca.method.sparse import Attended

# vLLM's logger is set up for its own package only.
logger = init_logger("vllm.plugins.dca")

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
        recall, keys = attended.kept(attended.lines)
        for head in range(len(recall)):
            self.recall.observe(recall[head].item())
            self.keys.observe(keys[head].item())
        if recall.mean() < self.bound and not RecallWatch.warned:
            RecallWatch.warned = True
            logger.warning(
                "DCA: sparse prefill kept %.3f of a layer's attention, with %.3f of the keys, "
                "at position %d; sparse_min_recall is %.3f. A larger sparse_coverage, or "
                "larger budgets, keep more.",
                recall.mean(),
                keys.mean(),
                attended.segment.end,
                self.bound,
            )
