"""What sparse prefill keeps, as a server tells it."""

import json
from pathlib import Path

import pytest

from scripts.common.server import Server
from tests.helpers import checkpoints
from tests.helpers.inprocess import settle
from tests.helpers.sparse_served import AUTO, LENGTH, SIZES, STEP, THRESHOLD, options
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
