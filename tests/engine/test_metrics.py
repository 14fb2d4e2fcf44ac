"""What is counted of finished requests; tests/engine/test_parallel.py has several engines."""

from pathlib import Path

import pytest
from prometheus_client import REGISTRY
from vllm.v1.engine import FinishReason
from vllm.v1.metrics.stats import FinishedRequestStats, IterationStats

from tests.helpers.checkpoints import SIZES
from tests.helpers.inprocess import settle
from vllm_dca.engine.metrics import DcaStatLogger


@pytest.mark.parametrize(
    ("prompt", "answer", "chunks", "past_window"),
    [(1, 0, 1, 0), (63, 1, 1, 0), (64, 1, 2, 0), (128, 0, 2, 0), (128, 1, 3, 1)],
)
def test_at_the_borders_of_chunks_and_of_the_window(
    prompt: int, answer: int, chunks: int, past_window: int, llama: Path
) -> None:
    """Chunks of 64 tokens, a window of 128."""
    name = f"{prompt} and {answer}"
    config = settle(llama, additional_config={"dca": SIZES}, served_model_name=name)
    step = IterationStats()
    finished = FinishedRequestStats(FinishReason.STOP, num_prompt_tokens=prompt)
    finished.num_generation_tokens = answer
    step.finished_requests = [finished]
    DcaStatLogger(config).record(None, step)
    counted = [
        REGISTRY.get_sample_value(f"vllm_dca:{each}", {"model_name": name, "engine": "0"})
        for each in ("request_chunks_sum", "request_tokens_past_window_total")
    ]
    assert counted == [chunks, past_window]
