"""Through the whole engine: what the function promises still holds of served answers.

fp32 on both sides. 1e-3 in log-probability is what the project promises; matrix products of
other batch shapes alone move it by some 1e-5.
"""

from collections.abc import Iterator

import pytest
import torch
from vllm import LLM, SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from tests.conftest import DEMO_MODEL, DEMO_SIZES
from tests.helpers.answers import (
    ATOL,
    assert_close,
    assert_same_answer,
    generate,
    of_answer,
    of_prompt,
)
from tests.helpers.inprocess import engine
from vllm_dca.reference.model import forward, prompt_logprobs

CHUNK_LEN = DEMO_SIZES["chunk_size"] - DEMO_SIZES["local_size"]


@pytest.fixture(scope="module")
def demo_llm() -> Iterator[LLM]:
    """The demo model, with vLLM's default pages; in processes of its own test_serving has it.

    Compiling its 30 layers takes minutes: test_features compiles a smaller one.
    """
    options = {"additional_config": {"dca": DEMO_SIZES}, "max_model_len": 32768}
    options |= {"enforce_eager": True, "max_num_batched_tokens": 1000, "max_num_seqs": 16}
    options |= {"block_size": None, "num_gpu_blocks_override": None}
    with engine(DEMO_MODEL, skip_tokenizer_init=False, **options) as llm:
        yield llm


def test_prompt_logprobs_agree_with_the_reference(demo_llm: LLM, prose: list[int]) -> None:
    prompt = prose[2000 : 2000 + 2 * CHUNK_LEN + 164]
    [output] = generate(demo_llm, [prompt], prompt_logprobs=0)
    expected = prompt_logprobs(DEMO_MODEL, prompt, **DEMO_SIZES, dtype=torch.float32)
    error = (of_prompt(output) - expected).abs()
    assert error.max() <= ATOL
    # Not by way of ordinary attention, which is far from it past a chunk.
    ordinary = prompt_logprobs(DEMO_MODEL, prompt[:1400], dtype=torch.float32)
    assert (ordinary - expected[:1399]).abs()[CHUNK_LEN:].max() > 100 * ATOL


def test_below_one_chunk_dca_is_ordinary_attention(demo_llm: LLM, prose: list[int]) -> None:
    prompt = prose[:CHUNK_LEN]
    [output] = generate(demo_llm, [prompt], prompt_logprobs=0)
    ordinary = prompt_logprobs(DEMO_MODEL, prompt, dtype=torch.float32)
    assert_close(of_prompt(output), ordinary)


def test_batched_equals_single(demo_llm: LLM, prose: list[int]) -> None:
    lengths = [5, CHUNK_LEN - 1, CHUNK_LEN, CHUNK_LEN + 1, 2 * CHUNK_LEN + 5]
    prompts = [prose[1000 * k : 1000 * k + length] for k, length in enumerate(lengths)]
    demo_llm.reset_prefix_cache()
    together = generate(demo_llm, prompts, max_tokens=8)
    demo_llm.reset_prefix_cache()
    for prompt, expected in zip(prompts, together, strict=True):
        [alone] = generate(demo_llm, [prompt], max_tokens=8)
        assert_same_answer(alone, expected)


@pytest.mark.parametrize("shared", [CHUNK_LEN - 10, 2 * CHUNK_LEN, 2000])
def test_a_cached_prefix_equals_a_fresh_one(
    demo_llm: LLM, prose: list[int], shared: int
) -> None:
    prompt = prose[:shared] + prose[5000:5300]
    demo_llm.reset_prefix_cache()
    [fresh] = generate(demo_llm, [prompt], max_tokens=8)
    assert fresh.num_cached_tokens == 0
    # Cached by a prompt of another length, and of more chunks, which shares the prefix only.
    demo_llm.reset_prefix_cache()
    generate(demo_llm, [prose[:shared] + prose[9000:9800]])
    [cached] = generate(demo_llm, [prompt], max_tokens=8)
    assert cached.num_cached_tokens == shared // 128 * 128
    assert_same_answer(cached, fresh)


def test_decode_rows_equal_prefill_rows(demo_llm: LLM, prose: list[int]) -> None:
    """Answers that grow across a chunk border, read again as a prompt."""
    for border in (CHUNK_LEN, 2 * CHUNK_LEN):
        prompt = prose[: border - 8]
        [output] = generate(demo_llm, [prompt], max_tokens=16)
        tokens, logprobs = of_answer(output)
        demo_llm.reset_prefix_cache()
        [again] = generate(demo_llm, [prompt + tokens], prompt_logprobs=0)
        assert_close(of_prompt(again)[-16:], logprobs)


def test_structured_output(demo_llm: LLM, prose: list[int]) -> None:
    """Of single letters it takes the one that DCA finds likeliest."""
    prompt, letters = prose[:1500], "ABCDEFGH"
    structure = StructuredOutputsParams(choice=list(letters))
    params = SamplingParams(temperature=0, max_tokens=4, structured_outputs=structure)
    [output] = demo_llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
    logits, _ = forward(DEMO_MODEL, prompt, **DEMO_SIZES, dtype=torch.float32)
    tokenizer = demo_llm.get_tokenizer()
    likelihood = {letter: logits[-1, tokenizer.encode(letter)[0]] for letter in letters}
    assert output.outputs[0].text == max(likelihood, key=likelihood.get)
