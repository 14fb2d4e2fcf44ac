"""What sparse prefill keeps, as a server tells it."""

import json
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from prometheus_client import REGISTRY

from scripts.common.server import Server
from tests.helpers import checkpoints
from tests.helpers.inprocess import settle
from tests.helpers.sparse_served import AUTO, LENGTH, SIZES, STEP, THRESHOLD, options
from vllm_dca.engine import sparse_metrics
from vllm_dca.engine.sparse_metrics import RecallSampler


@pytest.mark.parametrize("groups", [1, 2, 3, 4])
def test_the_layers_of_every_group_are_looked_at(groups: int, llama: Path) -> None:
    """One step in sixteen of each KV cache group, whose builders ask in turns."""
    sampler = RecallSampler(settle(llama, **options(**AUTO)))
    steps = 16 * 48
    taken = [sampler.takes_next_step() for _ in range(groups * steps)]
    assert taken[0]
    for group in range(groups):
        assert sum(taken[group::groups]) == pytest.approx(steps / 16, abs=4)


def test_figures_are_counted_once_they_have_come(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first segment's are there when asked for the third time, and hold up the second's."""
    asked: list[int] = []

    def to_host(figures: torch.Tensor) -> tuple[torch.Tensor, Any]:
        if figures[0, 0] == 0.25:
            return figures, lambda: asked.append(1) or len(asked) >= 3
        return figures, lambda: True

    monkeypatch.setattr(sparse_metrics, "_to_host", to_host)
    config = settle(llama, **options(**AUTO), served_model_name="late")
    sampler = RecallSampler(config)
    for recall in (0.25, 0.5):
        figures = torch.tensor([recall, recall]), torch.tensor([0.125, 0.125])
        sampler.watch(
            types.SimpleNamespace(
                kept=lambda _, figures=figures: figures,
                lines=None,
                segment=types.SimpleNamespace(end=900),
            )
        )
    counted = []
    for _ in range(4):
        sampler.collect()
        counted.append(
            [
                REGISTRY.get_sample_value(f"vllm_dca:sparse_{name}", {"model_name": "late"})
                for name in ("recall_count", "recall_sum", "keys_sum")
            ]
        )
    # Two heads each.
    assert counted == [[0, 0, 0], [0, 0, 0], [4, 1.5, 0.5], [4, 1.5, 0.5]]


def test_metrics_say_what_was_kept(tmp_path: Path) -> None:
    """The workers count it, and /metrics finds it in the folder where they meet."""
    model = checkpoints.write(tmp_path / "model", "LlamaConfig")
    checkpoints.write_tokenizer(model)
    (tmp_path / "metrics").mkdir()
    server = Server(
        tmp_path / "log",
        model,
        *(
            "--additional-config",
            json.dumps({"dca": {**SIZES, **AUTO, "sparse_threshold": THRESHOLD}}),
        ),
        *("--dtype", "float32", "--max-model-len", "1300", "--block-size", "16"),
        *("--max-num-batched-tokens", str(STEP), "--enforce-eager"),
        PROMETHEUS_MULTIPROC_DIR=str(tmp_path / "metrics"),
    )
    try:
        server.wait()
        for seed in range(2):
            prompt = checkpoints.tokens(LENGTH, seed)
            status, answer = server.complete(prompt=prompt, max_tokens=2)
            assert status == 200, answer
        count, recall, keys = (
            server.metric(f"vllm_dca:sparse_{name}", model_name=server.model)
            for name in ("recall_count", "recall_sum", "keys_sum")
        )
    finally:
        server.stop()
    # The first sparse step, with one segment: two layers of four heads.
    assert count == 8
    assert 0 < keys < recall < count
