"""The CUDA path in vLLM's own engine on the CPU: real metadata, kernels in the interpreter.

Under both of vLLM's model runners: V2, CUDA's default, schedules asynchronously here as there.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import checkpoints, interpreter
from tests.helpers.answers import assert_close, generate, of_prompt
from tests.helpers.inprocess import engine
from tests.helpers.rehearsal import DCA, OPTIONS, SIZES, assert_agrees
from tests.helpers.runners import under
from vllm_dca.reference.model import prompt_logprobs

interpreter.repair()


def assert_engine_agrees(tmp_path: Path, provider: str) -> set[str]:
    """Prompts and answers across chunks, and prefills and decodes in one batch.

    Returns:
        The kernels that were launched.
    """
    llama = checkpoints.write(tmp_path, "LlamaConfig")
    prompts = [checkpoints.tokens(length, length) for length in (100, 31)]
    sizes = {**DCA["additional_config"]["dca"], "prefill_provider": provider}
    options = {**OPTIONS, "additional_config": {"dca": sizes}}
    with engine(llama, **options) as llm, interpreter.launches() as launched:
        answers = generate(llm, prompts, max_tokens=4, prompt_logprobs=0)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert_close(of_prompt(answer), prompt_logprobs(llama, prompt, **SIZES))
        assert_agrees(llama, prompt, answer)
    return {name for name, *_ in launched}


DECODE = {"plan_kernel", "decode_kernel", "reduce_kernel"}
PASSES = {"turn_kernel", "attention_kernel", "merge_kernel"}


@under("V1", "V2")
def test_engine_agrees_with_reference(tmp_path: Path) -> None:
    found = assert_engine_agrees(tmp_path, "triton")
    assert found >= {*DECODE, "prefill_kernel"}
    assert not found & PASSES


@under("V2")
def test_three_passes_agree_with_reference(tmp_path: Path) -> None:
    found = assert_engine_agrees(tmp_path, "triton_passes")
    assert found >= DECODE | PASSES
    assert "prefill_kernel" not in found


LLAMA = "LlamaConfig", {}
# Every other layer has a window; so many heads share a KV head that few tokens are decoded.
GPT_OSS = (
    "GptOssConfig",
    {
        **checkpoints.MOE,
        "num_hidden_layers": 4,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "sliding_window": 40,
        "num_local_experts": 4,
    },
)


@pytest.mark.parametrize(
    ("model", "temperature", "provider", "launches"),
    [
        # Two chunks, three, and a few tokens past two, in three numbers.
        (LLAMA, None, "triton", 2 + 3),
        (LLAMA, 40, "triton", 2 + 3),
        # One chunk too, where what is merged may be a pass and a sink.
        (GPT_OSS, 40, "triton_passes", 1 + 2 + 3 + 3 * 3),
    ],
    ids=["Llama", "tempered", "passes and sinks"],
)
def test_a_long_prompt_finds_its_kernels_compiled(
    model: tuple[str, dict[str, Any]],
    temperature: int | None,
    provider: str,
    launches: int,
    tmp_path: Path,
) -> None:
    """vLLM's workers on a GPU run the registry before the server says that it is ready."""
    from vllm.model_executor.warmup.jit_warmup import JitWarmupRegistry

    from vllm_dca.engine.impl import DcaImpl

    config, changes = model
    path = checkpoints.write(tmp_path, config, **changes)
    sizes = {
        **DCA["additional_config"]["dca"],
        "original_max_position_embeddings": temperature,
        "prefill_provider": provider,
    }
    pages = {"block_size": 32, "num_gpu_blocks_override": 300}  # layers with a window want them
    options = {**OPTIONS, **pages, "additional_config": {"dca": sizes}}
    registry = JitWarmupRegistry(None)
    with registry.activate(), engine(path, **options) as llm:
        registry.vllm_config = llm.llm_engine.vllm_config
        layers = registry.vllm_config.compilation_config.static_forward_context.values()
        caches = [
            layer.kv_cache
            for layer in layers
            if isinstance(getattr(layer, "impl", None), DcaImpl)
        ]
        for cache in caches:
            cache.fill_(torch.nan)
        with interpreter.launches() as warm:
            registry.warmup()
        assert all(cache.isnan().all() for cache in caches)
        with interpreter.launches() as again:
            registry.warmup()
        for cache in caches:
            cache.zero_()
        with interpreter.launches() as used:
            # The first step's are all of one chunk.
            generate(llm, [checkpoints.tokens(31), checkpoints.tokens(100)], max_tokens=4)
    of_prefill = {"prefill_kernel"} if provider == "triton" else PASSES
    assert {name for name, *_ in used} == of_prefill | DECODE
    assert set(used) <= set(warm)
    # Once for all layers and once a process, by two kinds of queries.
    assert len(caches) == 2
    counted = Counter[str]()
    for (name, *_), n in warm.items():
        counted[name] += n
    attends = "prefill_kernel" if provider == "triton" else "attention_kernel"
    assert counted[attends] == 2 * launches
    assert not again
