"""What vLLM's /metrics says of DCA, by its plugin group for statistics.

How many segments a step has is known in the workers only, and no statistic of vLLM carries it
from there; chunks of a request stand in for it.
"""

import functools
from typing import Any, NamedTuple

from prometheus_client import Counter, Gauge, Histogram
from vllm.config import VllmConfig
from vllm.v1.metrics.loggers import StatLoggerBase
from vllm.v1.metrics.stats import IterationStats, SchedulerStats

from vllm_dca.engine.settings import settings_of
from vllm_dca.engine.shims import names_dca

LABELS = ["model_name", "engine"]


class _Metrics(NamedTuple):
    chunk_len: Gauge
    tokens: Counter
    past_window: Counter
    chunks: Histogram


@functools.cache
def _registered() -> _Metrics:
    """Once a process, whatever the number of engines."""
    return _Metrics(
        Gauge(
            "vllm_dca:chunk_len",
            "Tokens a chunk: keys repeat their positions with this period.",
            LABELS,
            multiprocess_mode="mostrecent",
        ),
        Counter(
            "vllm_dca:request_tokens",
            "Tokens of finished requests, prompts and answers.",
            LABELS,
        ),
        Counter(
            "vllm_dca:request_tokens_past_window",
            "Those at positions that the model was not trained on.",
            LABELS,
        ),
        Histogram(
            "vllm_dca:request_chunks",
            "Chunks of finished requests.",
            LABELS,
            buckets=[2**n for n in range(11)],
        ),
    )


class DcaStatLogger(StatLoggerBase):
    """Counts finished requests of one engine; without DCA it does nothing."""

    def __init__(self, vllm_config: VllmConfig, engine_index: int = 0) -> None:
        self.active = names_dca(vllm_config.attention_config)
        if not self.active:
            return
        model_config = vllm_config.model_config
        settings = settings_of(vllm_config)
        self.chunk_len, self.window = settings.geometry.chunk_len, settings.window
        labels = (model_config.served_model_name, str(engine_index))
        metrics = _registered()
        metrics.chunk_len.labels(*labels).set(self.chunk_len)
        self.tokens = metrics.tokens.labels(*labels)
        self.past_window = metrics.past_window.labels(*labels)
        self.chunks = metrics.chunks.labels(*labels)

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: IterationStats | None,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        """Count what finished in a step."""
        if not self.active or iteration_stats is None:
            return
        for request in iteration_stats.finished_requests:
            tokens = request.num_prompt_tokens + request.num_generation_tokens
            self.tokens.inc(tokens)
            self.past_window.inc(max(tokens - self.window, 0))
            self.chunks.observe(-(-tokens // self.chunk_len))

    def log_engine_initialized(self) -> None:
        """Nothing: start-up said it."""
