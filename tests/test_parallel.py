"""Several ranks answer as the reference does: DCA arrives whole at each."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import checkpoints
from tests.answers import generate, of_answer, of_prompt
from vllm_dca.reference_model import prompt_logprobs

ATOL = 1e-3
SIZES = {"chunk_size": 96, "local_size": 32}


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        ({"tensor_parallel_size": 2, "enforce_eager": True}, {}),
        # One KV head, replicated; each rank has its own query heads.
        ({"tensor_parallel_size": 2, "enforce_eager": True}, {"num_key_value_heads": 1}),
        # vLLM 0.32 has no eager pipelines on the CPU.
        ({"pipeline_parallel_size": 2}, {}),
    ],
    ids=["TP", "TP, MQA", "PP"],
)
def test_two_ranks_agree_with_reference(
    options: dict[str, Any],
    changes: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vllm import LLM

    first, second, *_ = sorted(os.sched_getaffinity(0))
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", f"{first}|{second}")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
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
    torch.testing.assert_close(found, expected, rtol=0, atol=ATOL)
