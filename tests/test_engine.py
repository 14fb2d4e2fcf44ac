"""Through the whole engine: what the function promises still holds of served answers.

fp32 on both sides. 1e-3 in log-probability is what the project promises; matrix products of
other batch shapes alone move it by some 1e-5.
"""

import pytest
import torch
from vllm import LLM, RequestOutput, SamplingParams

from tests.conftest import DEMO_MODEL, DEMO_SIZES
from vllm_dca.reference_model import prompt_logprobs

ATOL = 1e-3
CHUNK_LEN = DEMO_SIZES["chunk_size"] - DEMO_SIZES["local_size"]


def generate(
    llm: LLM, prompts: list[list[int]], max_tokens: int = 1, **params: int
) -> list[RequestOutput]:
    return llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        SamplingParams(
            temperature=0, max_tokens=max_tokens, ignore_eos=True, logprobs=0, **params
        ),
        use_tqdm=False,
    )


def of_prompt(output: RequestOutput) -> torch.Tensor:
    """Log-probability of every prompt token but the first."""
    tokens = output.prompt_token_ids[1:]
    return torch.tensor(
        [at[t].logprob for at, t in zip(output.prompt_logprobs[1:], tokens, strict=True)]
    )


def of_answer(output: RequestOutput) -> tuple[list[int], torch.Tensor]:
    answer = output.outputs[0]
    return list(answer.token_ids), torch.tensor(
        [at[t].logprob for at, t in zip(answer.logprobs, answer.token_ids, strict=True)]
    )


def assert_same_answer(one: RequestOutput, other: RequestOutput) -> None:
    (tokens, logprobs), (other_tokens, other_logprobs) = of_answer(one), of_answer(other)
    assert tokens == other_tokens
    torch.testing.assert_close(logprobs, other_logprobs, rtol=0, atol=ATOL)


def test_prompt_logprobs_agree_with_the_reference(demo_llm: LLM, prose: list[int]) -> None:
    prompt = prose[2000 : 2000 + 4096]
    [output] = generate(demo_llm, [prompt], prompt_logprobs=0)
    expected = prompt_logprobs(DEMO_MODEL, prompt, **DEMO_SIZES, dtype=torch.float32)
    error = (of_prompt(output) - expected).abs()
    assert error.max() <= ATOL
    # Not by way of ordinary attention, which is far from it past a chunk.
    ordinary = prompt_logprobs(DEMO_MODEL, prompt[:1500], dtype=torch.float32)
    assert (ordinary - expected[:1499]).abs()[CHUNK_LEN:].max() > 100 * ATOL


def test_below_one_chunk_dca_is_ordinary_attention(demo_llm: LLM, prose: list[int]) -> None:
    prompt = prose[:CHUNK_LEN]
    [output] = generate(demo_llm, [prompt], prompt_logprobs=0)
    ordinary = prompt_logprobs(DEMO_MODEL, prompt, dtype=torch.float32)
    torch.testing.assert_close(of_prompt(output), ordinary, rtol=0, atol=ATOL)


def test_batched_equals_single(demo_llm: LLM, prose: list[int]) -> None:
    lengths = [5, CHUNK_LEN - 1, CHUNK_LEN, CHUNK_LEN + 1, 2 * CHUNK_LEN - 3, 2500]
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
    # Cached by a prompt of another length, which shares the prefix only.
    demo_llm.reset_prefix_cache()
    generate(demo_llm, [prose[:shared] + prose[9000:10500]])
    [cached] = generate(demo_llm, [prompt], max_tokens=8)
    assert cached.num_cached_tokens == shared // 128 * 128
    assert_same_answer(cached, fresh)


def test_decode_rows_equal_prefill_rows(demo_llm: LLM, prose: list[int]) -> None:
    """Answers that grow across a chunk border, read again as a prompt."""
    for border in (CHUNK_LEN, 3 * CHUNK_LEN):
        prompt = prose[: border - 8]
        [output] = generate(demo_llm, [prompt], max_tokens=16)
        tokens, logprobs = of_answer(output)
        demo_llm.reset_prefix_cache()
        [again] = generate(demo_llm, [prompt + tokens], prompt_logprobs=0)
        torch.testing.assert_close(of_prompt(again)[-16:], logprobs, rtol=0, atol=ATOL)
