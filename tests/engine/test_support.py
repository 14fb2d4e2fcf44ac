"""The support table says what is refused, what is proved, and where; nothing else."""

import ast
from pathlib import Path

import pytest

from scripts.docs import tables
from scripts.docs.support_table import FEATURES, SUPPORTED
from tests.engine.test_models import KINDS
from tests.helpers import checkpoints
from vllm_dca.engine.refusals import (
    REFUSALS,
    REFUSED_AS_BUILT,
    REFUSED_BY_VLLM,
    REFUSED_IN_LAYERS,
)
from vllm_dca.engine.support import ROPE_TYPES

TESTS = Path(__file__).parent
# Which test shows each thing that the table calls supported ...
PROOFS = {
    "CPU": "test_engine::test_prompt_logprobs_agree_with_the_reference",
    "CUDA": "test_cuda_path::test_engine_agrees_with_reference",
    "fp32": "test_engine::test_prompt_logprobs_agree_with_the_reference",
    "bf16": "test_models::test_half_precision",
    "fp16": "test_models::test_half_precision",
    "a KV cache of the model's dtype": "test_models::test_half_precision",
    "on CUDA also FP8": "../cuda/test_decode::test_decode_agrees_with_reference",
    "chunked prefill": "test_features::test_prefills_cut_at_odd_places_among_many_requests",
    "prefix caching": "test_engine::test_a_cached_prefix_equals_a_fresh_one",
    "mixed batches": "test_engine::test_batched_equals_single",
    "preemption": "test_models::test_preempted_requests_answer_as_if_alone",
    "torch.compile": "test_features::test_torch_compile",
    "`--enforce-eager`": "test_models::test_llama",
    "`n` samples": "test_features::test_samples_beams_and_reloaded_weights",
    "beam search": "test_features::test_samples_beams_and_reloaded_weights",
    "log-probabilities": "test_engine::test_prompt_logprobs_agree_with_the_reference",
    "structured output": "test_engine::test_structured_output",
    "LoRA": "test_features::test_lora_adapters_beside_the_model",
    "quantised weights": "test_features::test_quantised_weights",
    "embeddings and pooling": "test_features::test_embeddings_and_pooling",
    "prompts as embeddings": "test_features::test_prompts_as_embeddings",
    "reloading weights": "test_features::test_samples_beams_and_reloaded_weights",
    "[sparse prefill]": "test_sparse::test_auto_agrees_with_the_reference",
    "KV connectors": "test_features::test_a_kv_connector_brings_keys_from_another_engine",
    "speculative decoding by ngram": "test_models::test_speculation_by_ngram_changes_no_answer",
    "speculative decoding by EAGLE": "test_features::test_eagle_heads_are_attended_by_dca",
    "speculative decoding by a draft model": (
        "test_features::test_a_draft_model_drafts_past_its_window"
    ),
    "linear-attention layers": "test_models::test_linear_attention_layers_stay_as_they_are",
    "speculative decoding by multi-token predictors": (
        "test_drafters::test_what_is_drafted_is_what_the_layer_says_with_dca"
    ),
    "speculative decoding by Medusa": (
        "test_drafters::test_medusa_heads_draft_from_what_dca_left"
    ),
    "soft caps": "test_models::test_kinds_of_attention",
    "attention sinks": "test_models::test_kinds_of_attention",
    "M-RoPE for text": "test_mrope::test_text_past_the_window",
    "sliding-window layers": (
        "test_models::test_sliding_layers_keep_their_attention_and_positions"
    ),
    "tensor parallel": "test_parallel::test_ranks_agree_with_reference",
    "pipeline parallel": "test_parallel::test_ranks_agree_with_reference",
    "Ray": "test_ray::test_an_engine_over_two_nodes_agrees_with_the_reference",
    "data parallel": "test_parallel::test_data_parallel_engines_answer_alike",
    "any that divides": "test_models::test_any_block_size_that_divides_the_chunk_length",
}
# ... and each that the GPU's code was seen to serve in the interpreter, by model runner.
IN_BATCHES = "test_model_runner_v2::test_batches_prefixes_samples_and_structures"
AGREES = "test_cuda_path::test_engine_agrees_with_reference"
INTERPRETED = {
    "V1": {
        "chunked prefill": AGREES,
        "mixed batches": AGREES,
        "log-probabilities": AGREES,
        "`--enforce-eager`": AGREES,
        "[sparse prefill]": "test_cuda_sparse::test_a_checkpoint_s_budgets",
        "speculative decoding by ngram": "test_model_runner_v2::test_ngram",
        "speculative decoding by a draft model": "test_model_runner_v2::test_a_draft_model",
        "linear-attention layers": "test_model_runner_v2::test_linear_attention_layers",
        "sliding-window layers": "test_model_runner_v2::test_sliding_layers",
        "prefix caching": "test_model_runner_v2::test_sliding_layers",
        "M-RoPE for text": "test_mrope::test_text_by_the_gpu_s_code",
    },
    "V2": {
        "chunked prefill": AGREES,
        "mixed batches": AGREES,
        "log-probabilities": AGREES,
        "`--enforce-eager`": AGREES,
        "prefix caching": IN_BATCHES,
        "preemption": "test_model_runner_v2::test_preempted_requests_and_weights_reloaded",
        "CUDA graphs": "test_cuda_graphs::test_replays_of_other_batches",
        "asynchronous scheduling": IN_BATCHES,
        "`n` samples": IN_BATCHES,
        "structured output": IN_BATCHES,
        "LoRA": "test_model_runner_v2::test_lora",
        "embeddings and pooling": "test_model_runner_v2::test_pooling",
        "prompts as embeddings": "test_model_runner_v2::test_prompts_as_embeddings",
        "reloading weights": (
            "test_model_runner_v2::test_preempted_requests_and_weights_reloaded"
        ),
        "[sparse prefill]": "test_cuda_sparse::test_auto_agrees_with_the_reference",
        "KV connectors": "test_model_runner_v2::test_a_kv_connector",
        "speculative decoding by ngram": "test_model_runner_v2::test_ngram",
        "speculative decoding by EAGLE": "test_model_runner_v2::test_eagle",
        "speculative decoding by a draft model": "test_model_runner_v2::test_a_draft_model",
        "tensor parallel": "test_model_runner_v2::test_two_ranks",
        "linear-attention layers": "test_model_runner_v2::test_linear_attention_layers",
        "sliding-window layers": "test_model_runner_v2::test_sliding_layers",
        "soft caps": "test_model_runner_v2::test_caps_and_sinks",
        "attention sinks": "test_model_runner_v2::test_caps_and_sinks",
        "M-RoPE for text": "test_mrope::test_text_by_the_gpu_s_code",
    },
}
# ... and each that it calls refused.
BY_CONFIG = "test_refused_models::test_models_that_are_refused_by_their_config"
BY_OPTION = "test_refused_options::test_options_that_are_refused"
AS_BUILT = "test_refused_models::test_models_that_are_refused_as_they_are_built"
REFUSED = {
    "others": "test_refused_options::test_other_platforms_are_refused",
    "no RoPE": BY_CONFIG,
    "images and videos with M-RoPE": "test_mrope::test_images_are_refused_in_words_that_help",
    "images attended both ways": "test_images::test_images_attended_both_ways_are_refused",
    "MLA": BY_CONFIG,
    "encoders": BY_CONFIG,
    "cross attention": BY_CONFIG,
    "no attention": BY_CONFIG,
    "diffusion": "test_refused_models::test_diffusion_is_refused",
    "sliding windows in all layers": BY_CONFIG,
    "other quantised": BY_OPTION,
    "such a KV cache for the drafter": (
        "test_refused_drafters::test_a_drafter_s_own_cache_is_refused"
    ),
    "a backend per kind": BY_OPTION,
    "speculative decoding": BY_OPTION,
    "parallel drafting": "test_refused_drafters::test_parallel_drafting_is_refused",
    "adaptive verification": "test_refused_drafters::test_adaptive_verification_is_refused",
    "another attention backend": (
        "test_refused_drafters::test_a_drafter_with_another_backend_is_refused"
    ),
    "sparse prefill in fp32": "test_sparse_budgets::test_fp32_is_refused_on_cuda",
    "decode context": BY_OPTION,
    "prefill context": "test_refused_options::test_what_only_gpus_have_is_refused",
    "dual-batch overlap": "test_refused_options::test_what_only_gpus_have_is_refused",
    "layers that bring an attention": (
        "test_refused_models::test_layers_with_an_attention_of_their_own_are_refused"
    ),
    "values of another size": (
        "test_refused_models::test_layers_with_extra_attention_arguments_are_refused"
    ),
    "no rotary positions": AS_BUILT,
    "rotations that cannot": "test_rotary_trace::test_what_is_half_understood_is_refused",
    "what other rotary modules": AS_BUILT,
    "sparse prefill with soft": (
        "test_refused_options::test_where_soft_caps_and_sinks_are_refused"
    ),
    **dict.fromkeys(
        REFUSED_IN_LAYERS.values(), "test_refused_models::test_layers_that_are_refused"
    ),
    **dict.fromkeys(
        REFUSED_BY_VLLM, "test_refused_options::test_what_vllm_is_told_that_dca_cannot"
    ),
}


def assert_proved(claims: list[str], proofs: dict[str, str], runner: str | None = None) -> None:
    """Each claim starts with the name of exactly one proof, and its test exists.

    With a model runner the test also says that it runs under that one.
    """
    used = set()
    for claim in claims:
        [(start, proof)] = [pair for pair in proofs.items() if claim.startswith(pair[0])]
        module, _, name = proof.partition("::")
        tree = ast.parse((TESTS / f"{module}.py").read_text())
        [test] = [node for node in tree.body if getattr(node, "name", None) == name]
        if runner is not None:
            [under] = [
                each
                for each in test.decorator_list
                if isinstance(each, ast.Call) and getattr(each.func, "id", None) == "under"
            ]
            assert runner in [argument.value for argument in under.args], claim
        used.add(start)
    assert used == set(proofs)


@pytest.mark.parametrize("document", tables.DOCUMENTS, ids=lambda path: path.name)
def test_tables_are_those_of_the_records(document: Path) -> None:
    assert tables.rewritten(document.read_text()) == document.read_text()


def test_every_claim_has_a_test() -> None:
    claims = [
        claim
        for area, claims in SUPPORTED.items()
        if area not in ("vLLM", "models", "RoPE scaling")
        for claim in claims
    ]
    assert_proved(claims, PROOFS)


@pytest.mark.parametrize("runner", ["V1", "V2"])
def test_what_the_interpreter_showed_has_a_test(runner: str) -> None:
    shown = [feature for feature, where in FEATURES.items() if getattr(where, runner.lower())]
    assert_proved(shown, INTERPRETED[runner], runner)


def test_every_refusal_has_a_test() -> None:
    claims = [refusal.what for refusal in REFUSALS]
    claims += [claim for several in REFUSED_AS_BUILT.values() for claim in several]
    assert_proved([*claims, *REFUSED_IN_LAYERS.values(), *REFUSED_BY_VLLM], REFUSED)


def test_scalings_are_those_with_tests() -> None:
    assert set(ROPE_TYPES) == {"none", *checkpoints.SCALINGS, "proportional (Gemma 4)"}
    assert KINDS["proportional positions"] == "Gemma4ForCausalLM"
