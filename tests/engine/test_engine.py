"""Through the whole engine: what the function promises still holds of served answers.

fp32 on both sides. 1e-3 in log-probability is what the project promises; matrix products of
other batch shapes alone move it by some 1e-5.
"""

import json
from collections.abc import Iterator
from typing import Any

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
from vllm_dca.reference.model import forward, prompt_logprobs

CHUNK_LEN = DEMO_SIZES["chunk_size"] - DEMO_SIZES["local_size"]


@pytest.fixture(scope="module")
def demo_llm() -> Iterator[LLM]:
    """The demo model in fp32, in a process of its own, with vLLM's other defaults.

    Compiling its 30 layers takes minutes: test_features compiles a smaller one.
    """
    llm = LLM(
        str(DEMO_MODEL),
        enforce_eager=True,
        dtype="float32",
        attention_backend="dca",
        additional_config={"dca": DEMO_SIZES},
        max_model_len=32768,
        max_num_batched_tokens=1000,  # prefills are cut at odd places
        max_num_seqs=16,
    )
    yield llm
    llm.llm_engine.engine_core.shutdown()


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
    # Cached by a prompt of another length, which shares the prefix only.
    demo_llm.reset_prefix_cache()
    generate(demo_llm, [prose[:shared] + prose[9000:10500]])
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
    def answer(**structure: Any) -> str:
        params = SamplingParams(
            temperature=0,
            max_tokens=40,
            structured_outputs=StructuredOutputsParams(**structure),
        )
        [output] = demo_llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
        return output.outputs[0].text

    tokenizer = demo_llm.get_tokenizer()
    # An example, as by its own choice the model would fill JSON with line ends.
    example = '\n\n{"about": "war", "good": false} {"about": "war", "good": false}'
    prompt = prose[:1500] + tokenizer.encode(example)
    schema = {
        "type": "object",
        "properties": {"about": {"enum": ["marriage", "war"]}, "good": {"type": "boolean"}},
        "required": ["about", "good"],
        "additionalProperties": False,
    }
    found = json.loads(answer(json=schema))
    assert found["about"] in ("marriage", "war")
    assert isinstance(found["good"], bool)

    # Of single letters it takes the one that DCA finds likeliest.
    letters = "ABCDEFGH"
    logits, _ = forward(DEMO_MODEL, prompt, **DEMO_SIZES, dtype=torch.float32)
    likelihood = {letter: logits[-1, tokenizer.encode(letter)[0]] for letter in letters}
    assert answer(choice=list(letters)) == max(likelihood, key=likelihood.get)
