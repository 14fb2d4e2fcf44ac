"""The CUDA path in vLLM's own engine on the CPU: real metadata, kernels in the interpreter.

What only a GPU has is replaced: vLLM's kernel that stores keys and values, and the count of
multiprocessors. Which provider is chosen is not: without flash-attention, it is Triton's.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import checkpoints, interpreter
from tests.helpers.answers import drafted, generate, of_answer, of_prompt
from tests.helpers.inprocess import engine, in_a_child
from vllm_dca.engine import devices, remap
from vllm_dca.method.kv_cache import write_kv
from vllm_dca.reference.model import prompt_logprobs

interpreter.repair()
ATOL = 1e-3
SIZES = {"chunk_size": 48, "local_size": 16}
NGRAM = {
    "max_model_len": 128,
    "speculative_config": {
        "method": "ngram",
        "num_speculative_tokens": 3,
        "prompt_lookup_min": 1,
        "prompt_lookup_max": 2,
    },
}


@contextlib.contextmanager
def cuda_path() -> Iterator[None]:
    """DCA runs as on CUDA, and did so in the end."""
    from vllm import _custom_ops
    from vllm.platforms import current_platform

    ran: list[str] = []

    def reshape_and_cache_flash(
        key: torch.Tensor,
        value: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
        kv_cache_dtype: str,
        k_scale: torch.Tensor,
        v_scale: torch.Tensor,
    ) -> None:
        both = torch.as_strided(
            key_cache,
            (*key_cache.shape[:3], 2 * key_cache.shape[3]),
            key_cache.stride(),
            key_cache.storage_offset(),
        )
        write_kv(key, value, both.transpose(1, 2), slot_mapping)
        ran.append("store")

    def current_device(needs: Any, provider: str | None) -> devices.Device:
        device = devices._cuda(needs, provider)

        def decode(*args: Any, **kwargs: Any) -> None:
            device.decode(*args, **kwargs)
            ran.append("decode")

        assert device.provider == "triton"
        return device._replace(decode=decode)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_custom_ops, "reshape_and_cache_flash", reshape_and_cache_flash)
        patch.setattr(current_platform, "num_compute_units", lambda: 1, raising=False)
        patch.setattr(remap, "current_device", current_device)
        yield
    assert {"store", "decode"} <= set(ran)


def test_engine_agrees_with_reference(tmp_path: Path) -> None:
    """Prompts and answers across chunks, and prefills and decodes in one batch."""
    llama = checkpoints.write(tmp_path, "LlamaConfig")
    prompts = [checkpoints.tokens(length, length) for length in (100, 31)]
    options = {"max_model_len": 128, "max_num_batched_tokens": 50}
    with cuda_path(), engine(llama, additional_config={"dca": SIZES}, **options) as llm:
        answers = generate(llm, prompts, max_tokens=4, prompt_logprobs=0)
    for prompt, answer in zip(prompts, answers, strict=True):
        tokens, logprobs = of_answer(answer)
        expected = prompt_logprobs(llama, prompt + tokens, **SIZES)
        found = torch.cat([of_prompt(answer), logprobs]).double()
        torch.testing.assert_close(found, expected, rtol=0, atol=ATOL)


def test_speculated_rows_answer_as_single_ones(tmp_path: Path) -> None:
    """Verification has several rows a request, here across the border at 64 tokens."""
    in_a_child(_speculated_rows, tmp_path)


def _speculated_rows(tmp_path: Path) -> None:
    # So few words that whatever is generated was seen before, and is drafted from.
    llama = checkpoints.write(tmp_path, "LlamaConfig", vocab_size=16)
    prompt = [3 + 7 * i % 13 for i in range(60)]
    with cuda_path(), engine(llama, additional_config={"dca": SIZES}, **NGRAM) as llm:
        [speculated] = generate(llm, [prompt], max_tokens=8)
        assert drafted(llm) > 0
    tokens, logprobs = of_answer(speculated)
    expected = prompt_logprobs(llama, prompt + tokens, **SIZES)[-len(tokens) :]
    torch.testing.assert_close(logprobs.double(), expected, rtol=0, atol=ATOL)


@pytest.mark.parametrize("temperature", [None, 40])
def test_a_long_prompt_finds_its_kernels_compiled(
    temperature: int | None, tmp_path: Path
) -> None:
    """vLLM's workers on a GPU run the registry before the server says that it is ready."""
    from vllm.model_executor.warmup.jit_warmup import JitWarmupRegistry

    from vllm_dca.engine.impl import DcaImpl

    llama = checkpoints.write(tmp_path, "LlamaConfig")
    sizes = {**SIZES, "original_max_position_embeddings": temperature}
    options = {"max_model_len": 128, "max_num_batched_tokens": 50}
    registry = JitWarmupRegistry(None)
    with (
        cuda_path(),
        registry.activate(),
        engine(llama, additional_config={"dca": sizes}, **options) as llm,
    ):
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
    kernels |= {"plan_kernel", "split_kernel", "reduce_kernel"}
    assert {name for name, *_ in used} == kernels
    assert set(used) <= set(warm)
    # Once for all layers and once a process: passes over two chunks and three, by two queries.
    assert len(caches) == 2
    assert sum(n for (name, *_), n in warm.items() if name == "attention_kernel") == 2 * (2 + 3)
    assert not again
