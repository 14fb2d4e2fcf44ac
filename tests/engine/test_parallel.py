"""Several ranks answer as the reference does: DCA arrives whole at each."""

import concurrent.futures
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from scripts.common.server import Server
from tests.helpers import checkpoints
from tests.helpers.answers import assert_close, generate, of_answer, of_prompt
from tests.helpers.checkpoints import SIZES
from tests.helpers.ranks import one_core_each
from vllm_dca.reference.model import forward, prompt_logprobs


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        # The last of these has it too, with a pipeline.
        pytest.param(
            {"tensor_parallel_size": 2, "enforce_eager": True}, {}, marks=pytest.mark.nightly
        ),
        # One KV head, replicated; each rank has its own query heads.
        ({"tensor_parallel_size": 2, "enforce_eager": True}, {"num_key_value_heads": 1}),
        # vLLM 0.32 has no eager pipelines on the CPU.
        pytest.param({"pipeline_parallel_size": 2}, {}, marks=pytest.mark.nightly),
        ({"tensor_parallel_size": 2, "pipeline_parallel_size": 2}, {}),
    ],
    ids=["TP", "TP, MQA", "PP", "TP x PP"],
)
def test_ranks_agree_with_reference(
    options: dict[str, Any],
    changes: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vllm import LLM

    ranks = math.prod(size for name, size in options.items() if "parallel" in name)
    for name, value in one_core_each(ranks).items():
        monkeypatch.setenv(name, value)
    model = checkpoints.write(tmp_path, "LlamaConfig", **changes)
    prompt = checkpoints.tokens(300)
    llm = LLM(
        str(model),
        attention_backend="dca",
        additional_config={"dca": SIZES},
        dtype="float32",
        skip_tokenizer_init=True,
        max_model_len=1024,
        max_num_batched_tokens=100,
        num_gpu_blocks_override=200,
        block_size=16,
        **options,
    )
    try:
        [output] = generate(llm, [prompt], max_tokens=5, prompt_logprobs=0)
    finally:
        llm.llm_engine.engine_core.shutdown()
    tokens, logprobs = of_answer(output)
    expected = prompt_logprobs(model, prompt + tokens, **SIZES)
    found = torch.cat([of_prompt(output), logprobs]).double()
    assert_close(found, expected)


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
            server.metric("vllm:request_success_total", f'engine="{engine}"')
            for engine in (0, 1)
        ]
    finally:
        server.stop()
    assert sum(served) == 8
    assert min(served) > 0
    for tokens in answers:
        logits, _ = forward(model, prompt + tokens, **SIZES)
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == tokens
