"""An engine with sparse prefill, and what the reference answers in its steps."""

from pathlib import Path
from typing import Any

import torch

from tests.helpers import checkpoints
from tests.helpers import sparse as helper
from vllm_dca.reference.sparse import Rule

SIZES = {"chunk_size": 512, "local_size": 64}  # chunks of 448
THRESHOLD = 150
STEP = 512
LENGTH = 1180
STEPS = [512, 512, 156]
AUTO = {"sparse": "auto", "sparse_coverage": 0.5, "sparse_min_keys": 64}
AUTO_RULE = Rule(coverage=0.5, min_keys=64)
PROMPT = checkpoints.tokens(LENGTH)


def options(**sparse: Any) -> dict[str, Any]:
    return {
        "additional_config": {"dca": {**SIZES, "sparse_threshold": THRESHOLD, **sparse}},
        "max_num_batched_tokens": STEP,
        "max_model_len": 1300,
    }


def expected(
    model: Path,
    rules: list[Rule],
    prompt: list[int] = PROMPT,
    steps: list[int] = STEPS,
    threshold: int = THRESHOLD,
) -> torch.Tensor:
    return helper.prompt_logprobs(
        model, prompt, steps=steps, threshold=threshold, rules=rules, **SIZES
    )
