"""The CUDA path in vLLM's own engine on the CPU: real metadata, kernels in the interpreter.

Under both of vLLM's model runners: V2, CUDA's default, schedules asynchronously here as there.
"""

from pathlib import Path

import pytest
import torch

from tests.helpers import checkpoints, interpreter
from tests.helpers.answers import generate, of_prompt
from tests.helpers.inprocess import engine
from tests.helpers.rehearsal import DCA, OPTIONS, SIZES, assert_agrees, assert_close
from tests.helpers.runners import under
from vllm_dca.reference.model import prompt_logprobs

interpreter.repair()


@under("V1", "V2")
def test_engine_agrees_with_reference(tmp_path: Path) -> None:
    """Prompts and answers across chunks, and prefills and decodes in one batch."""
    llama = checkpoints.write(tmp_path, "LlamaConfig")
    prompts = [checkpoints.tokens(length, length) for length in (100, 31)]
    with engine(llama, **OPTIONS) as llm, interpreter.launches() as launched:
        answers = generate(llm, prompts, max_tokens=4, prompt_logprobs=0)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert_close(of_prompt(answer), prompt_logprobs(llama, prompt, **SIZES))
        assert_agrees(llama, prompt, answer)
    names = {name for name, *_ in launched}
    assert names >= {"plan_kernel", "decode_kernel", "reduce_kernel", "attention_kernel"}


@pytest.mark.parametrize("temperature", [None, 40])
def test_a_long_prompt_finds_its_kernels_compiled(
    temperature: int | None, tmp_path: Path
) -> None:
    """vLLM's workers on a GPU run the registry before the server says that it is ready."""
    from vllm.model_executor.warmup.jit_warmup import JitWarmupRegistry

    from vllm_dca.engine.impl import DcaImpl

    llama = checkpoints.write(tmp_path, "LlamaConfig")
    sizes = {**DCA["additional_config"]["dca"], "original_max_position_embeddings": temperature}
    options = {**OPTIONS, "additional_config": {"dca": sizes}}
    registry = JitWarmupRegistry(None)
    with registry.activate(), engine(llama, **options) as llm:
        registry.vllm_config = llm.llm_engine.vllm_config
        layers = registry.vllm_config.compilation_config.static_forward_context.values()
        caches = [layer.kv_cache for layer in layers if isinstance(layer.impl, DcaImpl)]
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
            generate(llm, [checkpoints.tokens(100), checkpoints.tokens(31)], max_tokens=4)
    kernels = {"turn_kernel", "attention_kernel", "merge_kernel"}
    kernels |= {"plan_kernel", "decode_kernel", "reduce_kernel"}
    assert {name for name, *_ in used} == kernels
    assert set(used) <= set(warm)
    # Once for all layers and once a process: passes over two chunks and three, by two queries.
    assert len(caches) == 2
    assert sum(n for (name, *_), n in warm.items() if name == "attention_kernel") == 2 * (2 + 3)
    assert not again
