"""The CUDA path in vLLM's own engine on the CPU: real metadata, kernels in the interpreter.

Under both of vLLM's model runners: V2, CUDA's default, schedules asynchronously here as there.
"""

from collections import Counter
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


@pytest.mark.parametrize(
    ("temperature", "provider", "launches"),
    # Of two chunks and three.
    [(None, "triton", 2), (40, "triton", 2), (40, "triton_passes", 2 + 3)],
)
def test_a_long_prompt_finds_its_kernels_compiled(
    temperature: int | None, provider: str, launches: int, tmp_path: Path
) -> None:
    """vLLM's workers on a GPU run the registry before the server says that it is ready."""
    from vllm.model_executor.warmup.jit_warmup import JitWarmupRegistry

    from vllm_dca.engine.impl import DcaImpl

    llama = checkpoints.write(tmp_path, "LlamaConfig")
    sizes = {
        **DCA["additional_config"]["dca"],
        "original_max_position_embeddings": temperature,
        "prefill_provider": provider,
    }
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
