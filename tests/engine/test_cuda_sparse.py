"""Sparse prefill by the CUDA path in vLLM's own engine on the CPU, in Triton's interpreter."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from prometheus_client import REGISTRY

from tests.helpers import checkpoints, interpreter
from tests.helpers import sparse as helper
from tests.helpers.answers import assert_close, generate, of_answer, of_prompt
from tests.helpers.inprocess import engine
from tests.helpers.runners import under
from vllm_dca.reference.sparse import Rule

interpreter.repair()

SIZES = {"chunk_size": 320, "local_size": 64}  # chunks of 256
THRESHOLD = 200
# The second and the third chunk are sparse, each in a step of its own.
LENGTH, STEPS = 780, [512, 268]
BUDGETS = [(40 + 10 * head, 110 + 50 * head) for head in range(4)]


def options(**sparse: Any) -> dict[str, Any]:
    own = {**SIZES, "sparse_threshold": THRESHOLD, "prefill_provider": "triton", **sparse}
    return {
        "additional_config": {"dca": own},
        "max_num_batched_tokens": STEPS[0],
        "max_model_len": 800,
    }


def patched(patch: pytest.MonkeyPatch) -> None:
    """The interpreter takes its time by the program. Dense passes turn queries as ever."""
    from vllm_dca.cuda import paged_pass, sparse_attend, sparse_probe
    from vllm_dca.cuda.tuning import Tuning
    from vllm_dca.method.rotary import turn_queries

    for module in (paged_pass, sparse_attend):
        patch.setattr(module, "prefill_tuning", lambda *_: Tuning(64, 64, 4, 3, 255))
    for module in (sparse_attend, sparse_probe):
        patch.setattr(module, "turn_queries", turn_queries)


def expected(
    model: Path, tokens: list[int], steps: list[int], rule: Rule, **more: Any
) -> torch.Tensor:
    given = {"steps": steps, "threshold": THRESHOLD, "rules": [rule] * 2}
    right = helper.prompt_logprobs(model, tokens, **given, **SIZES, **more)
    given["threshold"] = len(tokens)
    dense = helper.prompt_logprobs(model, tokens, **given, **SIZES, **more)
    # Else this could not tell sparse from dense.
    assert (right - dense).abs().max() > 0.02
    return right


@under("V2")
def test_auto_agrees_with_the_reference(tmp_path: Path) -> None:
    """Beside a dense request, in chunks of a prompt, after a cached prefix; metrics follow."""
    llama = checkpoints.write(tmp_path, "LlamaConfig")
    prompts = [checkpoints.tokens(length, length) for length in (LENGTH, 30)]
    auto = {"sparse": "auto", "sparse_coverage": 0.5, "sparse_min_keys": 64}
    label = {"model_name": str(llama)}
    with pytest.MonkeyPatch.context() as patch:
        patched(patch)
        with engine(llama, **options(**auto)) as llm, interpreter.launches() as launched:
            answers = generate(llm, prompts, max_tokens=2)
            [again] = generate(llm, prompts[:1], max_tokens=2)
    for prompt, answer in zip(prompts, answers, strict=True):
        tokens, logprobs = of_answer(answer)
        sequence = prompt + tokens
        steps = [*STEPS, 1, 1] if len(prompt) == LENGTH else [len(sequence)]
        if len(prompt) == LENGTH:
            right = expected(llama, sequence, steps, Rule(coverage=0.5, min_keys=64))
        else:
            right = helper.prompt_logprobs(
                llama, sequence, steps=steps, threshold=99, rules=[Rule()] * 2, **SIZES
            )
        assert_close(logprobs, right[-len(tokens) :])
    # A cached prefix is what the steps made that cached it.
    assert again.num_cached_tokens == LENGTH // 16 * 16
    tokens, logprobs = of_answer(again)
    assert tokens == of_answer(answers[0])[0]
    assert_close(logprobs, of_answer(answers[0])[1].double())
    names = {name for name, *_ in launched}
    assert names >= {"normalise_kernel", "weigh_kernel", "choose_kernel", "attend_kernel"}
    count, recall, keys = (
        REGISTRY.get_sample_value(f"vllm_dca:sparse_{kind}", label)
        for kind in ("recall_count", "recall_sum", "keys_sum")
    )
    # Of its first sixteen sparse steps one, with a segment: two layers of four heads.
    assert count == 8
    assert 0 < keys < recall < count


@under("V2")
def test_verified_rows_beside_a_segment(tmp_path: Path) -> None:
    """A request's drafts in the step that has another's segment, and dense tokens around it."""
    from vllm_dca.engine.metadata import DcaMetadataBuilder

    # So few words that whatever is generated was seen before, and is drafted from.
    small = {"vocab_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    llama = checkpoints.write(tmp_path, "LlamaConfig", **small)
    short, long = (
        [3 + token % 13 for token in checkpoints.tokens(length, length)] for length in (40, 530)
    )
    lookup = {"method": "ngram", "prompt_lookup_min": 1, "prompt_lookup_max": 2}
    draft = {"speculative_config": {**lookup, "num_speculative_tokens": 3}}
    auto = {"sparse": "auto", "sparse_coverage": 0.5, "sparse_min_keys": 64}
    split, beside = DcaMetadataBuilder.split, []

    def seen(builder: Any, requests: Any, num_decodes: int, num_prefills: int) -> Any:
        found = split(builder, requests, num_decodes, num_prefills)
        if found:
            rows = requests.host_starts.diff().tolist()
            beside.append((rows[:num_decodes], [(each.begin, each.end) for each in found[0]]))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patched(patch)
        patch.setattr(DcaMetadataBuilder, "split", seen)
        given = {**options(**auto), "max_num_batched_tokens": 290, **draft}
        with engine(llama, **given) as llm:
            answers = generate(llm, [short, long], max_tokens=3, prompt_logprobs=0)
    # Positions 250 to 255, and from 512 on, are dense.
    assert beside == [([4], [(256, 512)])]
    tokens, logprobs = of_answer(answers[0])
    given = {"steps": [len(short + tokens)], "threshold": 99, "rules": [Rule()] * 2}
    right = helper.prompt_logprobs(llama, short + tokens, **given, **SIZES)
    assert_close(logprobs, right[-len(tokens) :])
    tokens, logprobs = of_answer(answers[1])
    steps = [290 - len(short), len(long) + len(short) - 290, *[1] * len(tokens)]
    right = expected(llama, long + tokens, steps, Rule(coverage=0.5, min_keys=64))
    assert_close(of_prompt(answers[1]), right[: len(long) - 1])
    assert_close(logprobs, right[-len(tokens) :])


@under("V1")
def test_a_checkpoint_s_budgets(tmp_path: Path) -> None:
    """With the temperature that such checkpoints have; all kernels were compiled before."""
    from vllm.model_executor.warmup.jit_warmup import JitWarmupRegistry

    from vllm_dca.engine import warmup
    from vllm_dca.engine.metadata import DcaMetadataBuilder
    from vllm_dca.engine.step import DcaMetadata

    llama = checkpoints.write(tmp_path, "LlamaConfig")
    file = tmp_path / "budgets.json"
    entries = {str(head): ["vertical_and_slash", *each, 1] for head, each in enumerate(BUDGETS)}
    file.write_text(json.dumps([entries] * 2))
    temperature = {"original_max_position_embeddings": 100}
    own = {"sparse": "checkpoint", "sparse_budgets": str(file), **temperature}
    prompt = checkpoints.tokens(LENGTH)
    registry, built = JitWarmupRegistry(None), []
    build = DcaMetadataBuilder.build

    def kept(*args: Any, **kwargs: Any) -> DcaMetadata:
        built.append(build(*args, **kwargs))
        return built[-1]

    with pytest.MonkeyPatch.context() as patch:
        patched(patch)
        patch.setattr(DcaMetadataBuilder, "build", kept)
        patch.setattr(warmup, "CHUNK_LEN", 32)
        with registry.activate(), engine(llama, **options(**own)) as llm:
            registry.vllm_config = llm.llm_engine.vllm_config
            with interpreter.launches() as warm:
                registry.warmup()
            with interpreter.launches() as used:
                [answer] = generate(llm, [prompt], max_tokens=1, prompt_logprobs=0)
    verticals, slashes = zip(*BUDGETS, strict=True)
    rule = Rule(verticals, slashes, continuous=True)
    assert_close(of_prompt(answer), expected(llama, prompt, STEPS, rule, **temperature))
    assert "attend_kernel" in {name for name, *_ in used}
    assert set(used) <= set(warm)
    # All layers are sparse: nothing is planned that none of them would read.
    assert any(step.sparse for step in built)
    assert all((step.prefill is None) == (step.sparse is not None) for step in built)
