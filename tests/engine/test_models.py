"""Tiny checkpoints through the engine, far past their window, against the reference."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from scripts.models.proof import prove
from scripts.models.recipes import RECIPES
from tests.helpers import checkpoints, rounding
from tests.helpers.answers import (
    ATOL,
    assert_close,
    assert_same_answer,
    drafted,
    generate,
    of_answer,
    of_prompt,
    preemptions,
)
from tests.helpers.checkpoints import SIZES
from tests.helpers.inprocess import engine, in_a_child, settle
from vllm_dca.reference.model import prompt_logprobs

TEMPERED = {**SIZES, "original_max_position_embeddings": 64}
# As Qwen-1M checkpoints have them.
SPARSE = {
    "sparse_attention_enabled": True,
    "sparse_attention_threshold": 32768,
    "sparse_attention_last_q": 64,
}
LENGTH = 300
# Of those that were released, and two more.
QWEN = [
    *("Qwen2Config", "Qwen3MoeConfig"),
    pytest.param("Qwen2MoeConfig", marks=pytest.mark.nightly),
    pytest.param("Qwen3Config", marks=pytest.mark.nightly),
]
# One of each kind of attention; `python -m scripts.models.sweep` proves all.
KINDS = {
    "half of a head rotated, pairs interleaved": "Glm4ForCausalLM",
    "layers without positions, by transformers' code": "SmolLM3ForCausalLM",
    "windows, by transformers' code": "Olmo3ForCausalLM",
    "windows and a soft cap": "Gemma2ForCausalLM",
    "windows and sinks, on YaRN": "GptOssForCausalLM",
    "proportional positions": "Gemma4ForCausalLM",
    # Its pages are of 48 tokens, a chunk is of 64.
    "Mamba layers, and pages that do not divide a chunk": "GraniteMoeHybridForCausalLM",
}
NIGHTLY_KINDS = {
    "experts": "MixtralForCausalLM",
    "the numbers of a Llama under other names": "InternLM2ForCausalLM",
}


def assert_agrees(
    llm: Any, model: Path, settings: dict[str, int], length: int = LENGTH
) -> None:
    prompt = checkpoints.tokens(length)
    [output] = generate(llm, [prompt], prompt_logprobs=0)
    expected = prompt_logprobs(model, prompt, **settings)
    assert_close(of_prompt(output), expected)
    # The check can fail: ordinary attention is far away.
    assert (prompt_logprobs(model, prompt) - expected).abs().max() > 100 * ATOL


@pytest.mark.parametrize("family", QWEN)
def test_qwen_1m_checkpoints_start_unmodified(
    family: str, tmp_path: Path, dca_log: list[str]
) -> None:
    model = checkpoints.write(
        tmp_path, family, dual_chunk_attention_config={**TEMPERED, **SPARSE}
    )
    (tmp_path / "sparse_attention_config.json").write_text(
        json.dumps({"0": {"0": ["vertical_and_slash", 1000, 6096, 1]}})
    )
    with engine(model) as llm:
        assert_agrees(llm, model, TEMPERED)
    assert sum("the checkpoint asks for sparse prefill" in line for line in dca_log) == 1


def test_sparse_config_file_alone_asks_for_sparse(tmp_path: Path, dca_log: list[str]) -> None:
    changes = {"dual_chunk_attention_config": SIZES}
    model = checkpoints.write_config(tmp_path, "Qwen2Config", "Qwen2ForCausalLM", **changes)
    for expected, content in ((0, None), (1, {"0": {"0": ["vertical_and_slash", 1, 1, 1]}})):
        if content:
            (tmp_path / "sparse_attention_config.json").write_text(json.dumps(content))
        settle(model)
        asked = sum("the checkpoint asks for sparse prefill" in line for line in dca_log)
        assert asked == expected


# All query heads share one, and each has its own.
KV_HEADS = {"linear": 1, "dynamic NTK": 4}


@pytest.mark.parametrize("scaling", checkpoints.SCALINGS)
def test_llama(scaling: str, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"rope_parameters": checkpoints.SCALINGS[scaling]}
    changes["num_key_value_heads"] = KV_HEADS.get(scaling, 2)
    model = checkpoints.write(tmp_path, "LlamaConfig", **changes)
    with engine(model, additional_config={"dca": SIZES}) as llm:
        assert_agrees(llm, model, SIZES)


def test_windows_that_are_switched_off_by_transformers_code(tmp_path: Path) -> None:
    """One rotary module serves two types of layers, and DCA attends both."""
    # vLLM changes transformers' modules for the model, for good.
    in_a_child(_windows_switched_off, tmp_path)


def _windows_switched_off(directory: Path) -> None:
    kinds = ["sliding_attention", "full_attention"]
    changes = {"layer_types": kinds, "sliding_window": 32}
    windows = checkpoints.write(directory / "windows", "Olmo3Config", **changes)
    changes["layer_types"] = kinds[1:] * 2
    whole = checkpoints.write(directory / "whole", "Olmo3Config", **changes)
    options = {"disable_sliding_window": True, "additional_config": {"dca": SIZES}}
    prompt = checkpoints.tokens(LENGTH)
    # Before vLLM changes them.
    expected, ordinary = prompt_logprobs(whole, prompt, **SIZES), prompt_logprobs(whole, prompt)
    with engine(windows, **options) as llm:
        [output] = generate(llm, [prompt], prompt_logprobs=0)
    assert (of_prompt(output).double() - expected).abs().max() <= ATOL
    assert (ordinary - expected).abs().max() > 10 * ATOL


@pytest.mark.skipif(torch.cuda.is_available(), reason="only the CPU has a compiled kernel")
@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler(tmp_path: Path, dca_log: list[str]) -> None:
    """By torch: in pieces, after a cached prefix, and decode rows as prefill rows."""
    model = checkpoints.write(tmp_path, "LlamaConfig")
    options = {"max_num_batched_tokens": 90, "max_num_seqs": 90}
    with engine(model, additional_config={"dca": SIZES}, **options) as llm:
        assert_agrees(llm, model, SIZES)
        # It begins as the other did.
        prompt = checkpoints.tokens(60)
        [output] = generate(llm, [prompt], max_tokens=12)
        assert output.num_cached_tokens == 48
        answer, logprobs = of_answer(output)
        expected = prompt_logprobs(model, prompt + answer, **SIZES)[-12:]
        assert_close(logprobs, expected)
    assert any("prefill by torch" in line for line in dca_log)
    assert any("DCA attends by torch" in line and "no C++" in line for line in dca_log)


@pytest.mark.parametrize(
    "architecture",
    [
        *(pytest.param(KINDS[kind], id=kind) for kind in KINDS),
        *(
            pytest.param(NIGHTLY_KINDS[kind], id=kind, marks=pytest.mark.nightly)
            for kind in NIGHTLY_KINDS
        ),
    ],
)
def test_kinds_of_attention(architecture: str, tmp_path: Path) -> None:
    """A prompt in pieces, answers after a fresh and a cached prefix: as the sweep does it."""
    prove(tmp_path, RECIPES[architecture])


@pytest.mark.each_minor
def test_sliding_layers_keep_their_attention_and_positions(
    tmp_path: Path, dca_log: list[str]
) -> None:
    """Gemma 3: two kinds of layers, each with a RoPE and a KV-cache group of its own."""
    model = checkpoints.write(
        tmp_path,
        "Gemma3TextConfig",
        head_dim=32,
        sliding_window=40,
        num_hidden_layers=4,
        layer_types=["sliding_attention", "full_attention", *["sliding_attention"] * 2],
        initializer_range=0.5,
    )
    options = {"block_size": 32, "num_gpu_blocks_override": 300}
    with engine(model, additional_config={"dca": SIZES}, **options) as llm:
        backends = llm.apply_model(
            lambda model: [
                module.attn_backend.get_name()
                for _, module in model.named_modules()
                if hasattr(module, "attn_backend")
            ]
        )
        assert_agrees(llm, model, SIZES)
    [[before, full, *after]] = backends
    assert full == "DCA"
    assert after == [before] * 2
    assert before != "DCA"
    assert any("3 with a sliding window keep their own attention" in line for line in dca_log)


@pytest.mark.each_minor
def test_linear_attention_layers_stay_as_they_are(tmp_path: Path) -> None:
    """Qwen3-Next; vLLM's kernels want bf16, and pages that do not divide a chunk."""
    prove(tmp_path, RECIPES["Qwen3NextForCausalLM"])


# Flash-attention wants sixteens. Others are in test_matrix.
BLOCK_SIZES = [32, 64, 16] if torch.cuda.is_available() else [64, 1]


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_any_block_size_that_divides_the_chunk_length(block_size: int, llama: Path) -> None:
    blocks = 3200 // block_size
    with engine(
        llama,
        additional_config={"dca": SIZES},
        block_size=block_size,
        num_gpu_blocks_override=blocks,
    ) as llm:
        assert_agrees(llm, llama, SIZES)


def test_derived_sizes_are_the_documented_ones(llama: Path) -> None:
    # Three quarters of the window; five sixths of that are a chunk, in whole blocks.
    derived = {"chunk_size": 96, "local_size": 16}
    with engine(llama) as llm:
        assert_agrees(llm, llama, derived)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, llama: Path) -> None:
    assert_agrees_in_half_precision(llama, dtype, signal=10)


def assert_agrees_in_half_precision(model: Path, dtype: torch.dtype, signal: int) -> None:
    prompt = checkpoints.tokens(LENGTH)
    exact, tolerance = rounding.allowed(model, prompt, dtype, signal, **SIZES)
    name = str(dtype).removeprefix("torch.")
    with engine(model, additional_config={"dca": SIZES}, dtype=name) as llm:
        [output] = generate(llm, [prompt], prompt_logprobs=0)
    assert (of_prompt(output).double() - exact).abs().mean() <= tolerance


def test_preempted_requests_answer_as_if_alone(llama: Path) -> None:
    """Three requests of up to 300 tokens in a cache of 448: some must be recomputed."""
    prompts = [checkpoints.tokens(100 + seed, seed) for seed in range(3)]
    options = {"additional_config": {"dca": SIZES}, "max_model_len": 320}
    with engine(llama, num_gpu_blocks_override=28, **options) as llm:
        crowded = generate(llm, prompts, max_tokens=180)
        assert preemptions(llm) > 0
        for prompt, expected in zip(prompts, crowded, strict=True):
            llm.reset_prefix_cache()
            [alone] = generate(llm, [prompt], max_tokens=180)
            assert_same_answer(alone, expected)


def test_speculation_by_ngram_changes_no_answer(tmp_path: Path) -> None:
    """Verified tokens are rows of one request, on both sides of chunk borders."""
    in_a_child(_speculate_by_ngram, tmp_path)


def _speculate_by_ngram(tmp_path: Path) -> None:
    # So few words that whatever is generated was seen before, and is drafted from.
    model = checkpoints.write(tmp_path, "LlamaConfig", vocab_size=16)
    prompts = [[3 + step * i % 13 for i in range(100)] for step in (1, 7)]
    lookup = {"method": "ngram", "prompt_lookup_min": 1, "prompt_lookup_max": 2}

    def answers(**options: Any) -> tuple[list[Any], int]:
        with engine(model, additional_config={"dca": SIZES}, **options) as llm:
            return generate(llm, prompts, max_tokens=60), drafted(llm)

    expected, none = answers()
    assert none == 0
    # Last: see in_a_child.
    speculated, some = answers(speculative_config={**lookup, "num_speculative_tokens": 4})
    assert some > 0
    for one, other in zip(speculated, expected, strict=True):
        assert_same_answer(one, other)
