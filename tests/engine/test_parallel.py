"""Several ranks answer as the reference does: DCA arrives whole at each."""

import concurrent.futures
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from prometheus_client import REGISTRY

from scripts.common.server import Server
from tests.helpers import checkpoints
from tests.helpers.answers import assert_close, generate, of_answer, of_prompt
from tests.helpers.checkpoints import SIZES
from tests.helpers.inprocess import engine, settle
from tests.helpers.ranks import one_core_each
from vllm_dca.reference.model import forward, prompt_logprobs

# vLLM 0.32 has no eager pipelines on the CPU. This one is traced; its ranks compile nothing.
PIPELINE = {
    "pipeline_parallel_size": 2,
    "enforce_eager": False,
    "compilation_config": {"mode": 2, "backend": "eager"},
}


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        # The last of these has it too, with a pipeline.
        pytest.param({"tensor_parallel_size": 2}, {}, marks=pytest.mark.nightly),
        pytest.param(PIPELINE, {}, marks=pytest.mark.nightly),
        # One KV head, replicated; each rank has its own query heads.
        ({"tensor_parallel_size": 2, **PIPELINE}, {"num_key_value_heads": 1}),
    ],
    ids=["TP", "PP", "TP x PP, MQA"],
)
def test_ranks_agree_with_reference(
    options: dict[str, Any],
    changes: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ranks = math.prod(size for name, size in options.items() if "parallel" in name)
    for name, value in one_core_each(ranks).items():
        monkeypatch.setenv(name, value)
    model = checkpoints.write(tmp_path, "LlamaConfig", **changes)
    prompt = checkpoints.tokens(300)
    with engine(model, additional_config={"dca": SIZES}, **options) as llm:
        [output] = generate(llm, [prompt], max_tokens=5, prompt_logprobs=0)
    tokens, logprobs = of_answer(output)
    expected = prompt_logprobs(model, prompt + tokens, **SIZES)
    found = torch.cat([of_prompt(output), logprobs]).double()
    assert_close(found, expected)


def test_data_parallel_engines_are_counted_apart(tmp_path: Path) -> None:
    """All that DCA has to do with them: one process serves them, and says what each did."""
    from vllm.v1.engine import FinishReason
    from vllm.v1.metrics.loggers import StatLoggerManager, load_stat_logger_plugin_factories
    from vllm.v1.metrics.stats import FinishedRequestStats, IterationStats

    model = checkpoints.write_config(tmp_path, "LlamaConfig", "LlamaForCausalLM")
    config = settle(model, max_model_len=1024, additional_config={"dca": SIZES})
    manager = StatLoggerManager(config, [0, 1], load_stat_logger_plugin_factories())
    for index, tokens in ((1, 300), (0, 100), (1, 200)):
        step = IterationStats()
        finished = FinishedRequestStats(FinishReason.STOP, num_prompt_tokens=tokens)
        finished.num_generation_tokens = 8
        step.finished_requests = [finished]
        manager.record(None, step, engine_idx=index)
    counted = {
        index: [
            REGISTRY.get_sample_value(
                f"vllm_dca:{name}", {"model_name": str(model), "engine": index}
            )
            for name in (
                "chunk_len",
                "request_tokens_total",
                "request_tokens_past_window_total",
                "request_chunks_sum",
            )
        ]
        for index in ("0", "1")
    }
    # Chunks are of 64 tokens, the window of 128.
    assert counted == {"0": [64, 108, 0, 2], "1": [64, 516, 180 + 80, 5 + 4]}
    # Buckets are for 64K tokens of such chunks, too.
    label = {"model_name": str(model), "engine": "1"}
    assert [
        REGISTRY.get_sample_value(
            "vllm_dca:request_chunks_bucket", {**label, "le": f"{most}.0"}
        )
        for most in (4, 8, 1024)
    ] == [1, 2, 2]


def test_data_parallel_engines_answer_alike(tmp_path: Path) -> None:
    model = checkpoints.write(tmp_path / "model", "LlamaConfig")
    checkpoints.write_tokenizer(model)
    prompt = checkpoints.tokens(300)
    server = Server(
        tmp_path / "log",
        model,
        *("--additional-config", json.dumps({"dca": SIZES})),
        *("--dtype", "float32", "--max-model-len", "1024", "--block-size", "16"),
        *("--data-parallel-size", "2", "--enforce-eager"),
        # vLLM 0.33 gives each engine a memory node of its own, unless told that there is one.
        VLLM_CPU_SIM_MULTI_NUMA="0",
        **one_core_each(),
    )
    try:
        server.wait()

        def answer(_: int) -> list[int]:
            status, found = server.complete(
                prompt=prompt, max_tokens=8, ignore_eos=True, return_token_ids=True
            )
            assert status == 200, found
            return found["choices"][0]["token_ids"]

        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(answer, range(8)))
        served = [
            server.metric("vllm:request_success_total", engine=str(engine)) for engine in (0, 1)
        ]
    finally:
        server.stop()
    assert sum(served) == 8
    assert min(served) > 0
    for tokens in answers:
        logits, _ = forward(model, prompt + tokens, **SIZES)
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == tokens
