"""vLLM's features with DCA as CUDA runs them: Model Runner V2, and the CUDA path.

All of it in the interpreter, so that a step takes tenths of a second: short prompts, past
several chunks of 32 tokens. Where an engine need not be another, it answers for several.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from scripts.models.recipes import RECIPES
from tests.helpers import checkpoints, rounding
from tests.helpers.answers import (
    accepted,
    assert_close,
    drafted,
    generate,
    generate_from_embeddings,
    of_answer,
    of_prompt,
    preemptions,
)
from tests.helpers.companions import write_adapter, write_eagle
from tests.helpers.inprocess import engine, runner_of
from tests.helpers.ranks import one_core_each
from tests.helpers.rehearsal import OPTIONS, SIZES, assert_agrees
from tests.helpers.runners import under
from vllm_dca.engine import metadata
from vllm_dca.reference.model import forward, prompt_logprobs

PROMPT = checkpoints.tokens(100)


def write(directory: Path, **changes: Any) -> Path:
    """A tiny Llama."""
    return checkpoints.write(directory, "LlamaConfig", **changes)


@pytest.mark.each_minor
@under("V2")
def test_batches_prefixes_samples_and_structures(tmp_path: Path) -> None:
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    llama = write(tmp_path)
    checkpoints.write_tokenizer(llama)
    prompts = [checkpoints.tokens(length, length) for length in (70, 33, 5)]
    again = prompts[0][:64] + checkpoints.tokens(20)
    samples = SamplingParams(n=3, temperature=1.0, max_tokens=3, logprobs=0, detokenize=False)
    with engine(llama, skip_tokenizer_init=False, **OPTIONS) as llm:
        assert llm.llm_engine.vllm_config.scheduler_config.async_scheduling
        assert type(runner_of(llm)).__module__ == "vllm.v1.worker.cpu.model_runner"
        outputs = generate(llm, prompts, max_tokens=4)
        [cached] = generate(llm, [again], max_tokens=3)
        [sampled] = llm.generate([{"prompt_token_ids": again}], samples, use_tqdm=False)
        letters = "ABCDEFGH"
        structure = StructuredOutputsParams(choice=list(letters))
        [chosen] = llm.generate(
            [{"prompt_token_ids": PROMPT}],
            SamplingParams(temperature=0, max_tokens=4, structured_outputs=structure),
            use_tqdm=False,
        )
        tokenizer = llm.get_tokenizer()
    for prompt, output in zip(prompts, outputs, strict=True):
        assert_agrees(llama, prompt, output)
    assert cached.num_cached_tokens == 64
    assert_agrees(llama, again, cached)
    assert len({tuple(sample.token_ids) for sample in sampled.outputs}) == 3
    for sample in sampled.outputs:
        sampled.outputs = [sample]
        assert_agrees(llama, again, sampled)
    logits, _ = forward(llama, PROMPT, **SIZES)
    likelihood = {letter: logits[-1, tokenizer.encode(letter)[0]] for letter in letters}
    assert chosen.outputs[0].text == max(likelihood, key=likelihood.get)


@under("V2")
def test_preempted_requests_and_weights_reloaded(tmp_path: Path) -> None:
    """Three requests of up to 51 tokens, four pages each, where there are ten."""
    llama = write(tmp_path / "llama")
    other = write(tmp_path / "other", seed=1)
    prompts = [checkpoints.tokens(44 + seed, seed) for seed in range(3)]
    with engine(llama, num_gpu_blocks_override=11, **OPTIONS) as llm:
        outputs = generate(llm, prompts, max_tokens=6)
        assert preemptions(llm) > 0
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(other)})
        llm.reset_prefix_cache()
        [reloaded] = generate(llm, prompts[:1], max_tokens=2)
    for prompt, output in zip(prompts, outputs, strict=True):
        assert_agrees(llama, prompt, output)
    assert_agrees(other, prompts[0], reloaded)


@under("V2")
def test_lora(tmp_path: Path) -> None:
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    llama = write(tmp_path / "llama")
    adapter, merged = write_adapter(llama, tmp_path)
    params = SamplingParams(temperature=0, max_tokens=2, logprobs=0, detokenize=False)
    with engine(llama, enable_lora=True, max_lora_rank=8, **OPTIONS) as llm:
        # One after the other: in one step, vLLM's operators for CPUs take -1, which stands for
        # no adapter, for the last one.
        for request, model in (
            (LoRARequest("adapter", 1, str(adapter)), merged),
            (None, llama),
        ):
            [output] = llm.generate(
                [{"prompt_token_ids": PROMPT}], params, lora_request=request, use_tqdm=False
            )
            assert_agrees(model, PROMPT, output)


@under("V2")
def test_pooling(tmp_path: Path) -> None:
    llama = write(tmp_path)
    checkpoints.write_tokenizer(llama)
    _, hidden = forward(llama, PROMPT, **SIZES)
    expected = torch.nn.functional.normalize(hidden[-1], dim=-1)
    options = {"runner": "pooling", "convert": "embed", "skip_tokenizer_init": False}
    with engine(llama, **options, **OPTIONS) as llm:
        [output] = llm.embed([{"prompt_token_ids": PROMPT}], use_tqdm=False)
    assert_close(torch.tensor(output.outputs.embedding), expected)


@under("V2")
def test_prompts_as_embeddings(tmp_path: Path) -> None:
    llama = write(tmp_path)
    with engine(llama, enable_prompt_embeds=True, **OPTIONS) as llm:
        output = generate_from_embeddings(llm, llama, PROMPT, max_tokens=2)
    assert_agrees(llama, PROMPT, output)


@under("V2")
def test_a_kv_connector(tmp_path: Path) -> None:
    from vllm.config import KVTransferConfig

    llama = write(tmp_path / "llama")
    shared = KVTransferConfig(
        kv_connector="ExampleConnector",
        kv_role="kv_both",
        kv_connector_extra_config={"shared_storage_path": str(tmp_path / "store")},
    )
    options = {**OPTIONS, "max_num_batched_tokens": 128, "kv_transfer_config": shared}
    for cached in (0, 96):
        with engine(llama, **options) as llm:
            [output] = generate(llm, [PROMPT], max_tokens=3)
        assert output.num_cached_tokens == cached
        assert_agrees(llama, PROMPT, output)


@under("V1", "V2", apart=("V1",), nightly=("V1",))
def test_ngram(tmp_path: Path) -> None:
    """Rows of one request on both sides of the border at 64 tokens; V1 looks up by numba."""
    # So few words that whatever is generated was seen before, and is drafted from.
    llama = write(tmp_path, vocab_size=16)
    prompt = [3 + 7 * i % 13 for i in range(60)]
    lookup = {"method": "ngram", "prompt_lookup_min": 1, "prompt_lookup_max": 2}
    draft = {"speculative_config": {**lookup, "num_speculative_tokens": 3}}
    with engine(llama, **draft, **OPTIONS) as llm:
        [output] = generate(llm, [prompt], max_tokens=8)
        assert drafted(llm) > 0
    assert_agrees(llama, prompt, output)


@under("V2")
def test_eagle(tmp_path: Path) -> None:
    llama = write(tmp_path / "llama")
    head = write_eagle(tmp_path / "head", "eagle3")
    draft = {"method": "eagle3", "model": str(head), "num_speculative_tokens": 3}
    prompts = [checkpoints.tokens(60), checkpoints.tokens(29)]
    with engine(llama, speculative_config=draft, **OPTIONS) as llm:
        outputs = generate(llm, prompts, max_tokens=6)
        assert drafted(llm) > 0
    for prompt, output in zip(prompts, outputs, strict=True):
        assert_agrees(llama, prompt, output)


@pytest.mark.each_minor
@under("V1", "V2")
def test_a_draft_model(tmp_path: Path) -> None:
    """The model drafts for itself: if its layers attend as they should, each draft is right.

    With V2 no length is fetched from the device.
    """
    host_lengths = metadata.host_lengths

    def without_the_device(
        common: CommonAttentionMetadata, planned: slice, more: int, may_verify_late: bool
    ) -> torch.Tensor | None:
        if not may_verify_late:  # with V2
            common = common.replace(seq_lens=None)
        return host_lengths(common, planned, more, may_verify_late)

    llama = write(tmp_path)
    draft = {"method": "draft_model", "model": str(llama), "num_speculative_tokens": 3}
    prompts = [checkpoints.tokens(60), checkpoints.tokens(29)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metadata, "host_lengths", without_the_device)
        with engine(llama, speculative_config=draft, **OPTIONS) as llm:
            outputs = generate(llm, prompts, max_tokens=9)
            assert accepted(llm) == drafted(llm) > 6
    for prompt, output in zip(prompts, outputs, strict=True):
        assert_agrees(llama, prompt, output)


@under("V2")
def test_two_ranks(tmp_path: Path) -> None:
    llama = write(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in one_core_each().items():
            patch.setenv(name, value)
        with engine(llama, tensor_parallel_size=2, **OPTIONS) as llm:
            [output] = generate(llm, [PROMPT], max_tokens=3, prompt_logprobs=0)
    assert_close(of_prompt(output), prompt_logprobs(llama, PROMPT, **SIZES))
    assert_agrees(llama, PROMPT, output)


@under("V1", "V2", nightly=("V1",))
def test_sliding_layers(tmp_path: Path) -> None:
    """In pieces, decoded, after a prefix hit."""
    model = checkpoints.write(
        tmp_path,
        "Gemma3TextConfig",
        head_dim=32,
        sliding_window=20,
        num_hidden_layers=2,
        layer_types=["sliding_attention", "full_attention"],
        initializer_range=0.5,
    )
    assert_agrees_fresh_and_cached(model, block_size=32)


@under("V2")
def test_longrope(tmp_path: Path) -> None:
    """Its long factors, whose table has a period of its own."""
    rope = checkpoints.SCALINGS["LongRoPE"]
    assert_agrees_fresh_and_cached(write(tmp_path, rope_parameters=rope))


def assert_agrees_fresh_and_cached(model: Path, **options: Any) -> None:
    with engine(model, **options, **OPTIONS) as llm:
        outputs = [generate(llm, [PROMPT], max_tokens=3)[0] for _ in range(2)]
    assert [output.num_cached_tokens for output in outputs] == [0, 96]
    for output in outputs:
        assert_agrees(model, PROMPT, output)


@pytest.mark.parametrize("architecture", ["Gemma2ForCausalLM", "GptOssForCausalLM"])
@under("V2")
def test_caps_and_sinks(architecture: str, tmp_path: Path) -> None:
    """Of full layers between some with a window: in pieces, decoded, after a prefix hit."""
    recipe = RECIPES[architecture]
    changes = dict(recipe["changes"])
    if "Gemma" in architecture:
        # So low that it matters to scores as small as these.
        changes["attn_logit_softcapping"] = 2.0
        # So that it is not sure of its answers, which no attention would change then.
        changes["final_logit_softcapping"] = 3.0
    model = checkpoints.write(tmp_path, recipe["config"], **changes)
    prompts = [PROMPT, checkpoints.tokens(20)]
    expected = prompt_logprobs(model, PROMPT, **SIZES)
    with engine(model, **{**OPTIONS, **recipe["options"]}) as llm:
        outputs = generate(llm, prompts, max_tokens=3, prompt_logprobs=0)
        [cached] = generate(llm, [PROMPT], max_tokens=3)
    assert cached.num_cached_tokens > 0
    assert_close(of_prompt(outputs[0]), expected)
    for prompt, output in zip([*prompts, PROMPT], [*outputs, cached], strict=True):
        assert_agrees(model, prompt, output)


@under("V1", "V2")
def test_linear_attention_layers(tmp_path: Path) -> None:
    """Qwen3-Next: pages of 144 tokens, or of 80 without AVX-512; parts of them divide a chunk.

    vLLM wants bf16. States are kept where a page ends, so a prefix is hit up to there; the
    prompt's last token is always computed.
    """
    model = checkpoints.write(tmp_path, "Qwen3NextConfig", **checkpoints.QWEN3_NEXT)
    prompt = checkpoints.tokens(160)
    exact, tolerance = rounding.allowed(model, prompt, torch.bfloat16, signal=2, **SIZES)
    with engine(model, dtype="bfloat16", **{**OPTIONS, "max_model_len": 192}) as llm:
        page = llm.llm_engine.vllm_config.cache_config.block_size
        [read] = generate(llm, [prompt], prompt_logprobs=0)
        answers = [generate(llm, [prompt], max_tokens=8)[0] for _ in range(2)]
    assert answers[1].num_cached_tokens == (len(prompt) - 1) // page * page > 0
    assert (of_prompt(read) - exact).abs().mean() <= tolerance
    for answer in answers:
        tokens, logprobs = of_answer(answer)
        expected = prompt_logprobs(model, prompt + tokens, **SIZES)[-len(tokens) :]
        assert (logprobs - expected).abs().mean() <= tolerance
