"""Sparse prefill through the engine: as the reference answers, whatever else a step holds."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from prometheus_client import REGISTRY

from tests.helpers import checkpoints
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
from tests.helpers.companions import write_adapter, write_eagle
from tests.helpers.inprocess import engine, in_a_child, runner_of
from tests.helpers.sparse_served import (
    AUTO,
    AUTO_RULE,
    LENGTH,
    PROMPT,
    SIZES,
    STEPS,
    THRESHOLD,
    expected,
    options,
)
from vllm_dca.engine.sparse_metrics import RecallSampler
from vllm_dca.reference.model import prompt_logprobs
from vllm_dca.reference.sparse import Rule


@contextlib.contextmanager
def schedule_of(llm: Any) -> Iterator[dict[str, list[tuple[int, int]]]]:
    """By request: how many tokens each step found computed, and how many it took."""
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    found: dict[str, list[tuple[int, int]]] = {}
    original = scheduler.schedule

    def schedule(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        cached = output.scheduled_cached_reqs
        computed = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        for request in output.scheduled_new_reqs:
            computed[request.req_id] = request.num_computed_tokens
        for name, count in output.num_scheduled_tokens.items():
            found.setdefault(name, []).append((computed[name], count))
        return output

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler, "schedule", schedule)
        yield found


def assert_answers(
    output: Any, schedule: dict[str, list[tuple[int, int]]], model: Path, rules: list[Rule]
) -> list[int]:
    """As the reference answers in the steps that the request had, which are returned.

    Where a request began anew, only what it answered from there on is compared.
    """
    [own] = [steps for name, steps in schedule.items() if name.startswith(output.request_id)]
    begun = max(index for index, (computed, _) in enumerate(own) if computed == 0)
    steps = [count for _, count in own[begun:]]
    tokens, logprobs = of_answer(output)
    sequence = [*output.prompt_token_ids, *tokens][: sum(steps) + 1]
    right = expected(model, rules, sequence, [*steps, len(sequence) - sum(steps)])
    answered = len(own) - begun - sum(count > 1 for _, count in own[begun:]) + 1
    assert_close(logprobs[-answered:], right[-answered:])
    return steps


@pytest.fixture(scope="module")
def by_reference(llama: Path) -> torch.Tensor:
    """What `auto` answers, which is neither dense nor what other steps answer."""
    right = expected(llama, [AUTO_RULE] * 2)
    dense = expected(llama, [AUTO_RULE] * 2, threshold=len(PROMPT))
    assert_close(dense, prompt_logprobs(llama, PROMPT, **SIZES))
    assert_close(right[: THRESHOLD - 1], dense[: THRESHOLD - 1], atol=1e-9)
    assert (right - dense).abs()[THRESHOLD:].max() > 100 * ATOL
    return right


@pytest.mark.each_minor
def test_auto_agrees_with_the_reference(
    llama: Path, by_reference: torch.Tensor, dca_log: list[str]
) -> None:
    """The same steps give the same bits; decode rows are dense; what is kept is counted."""

    def kept() -> list[float]:
        label = {"model_name": str(llama)}
        names = [f"sparse_{kind}" for kind in ("recall_count", "recall_sum", "keys_sum")]
        return [REGISTRY.get_sample_value(f"vllm_dca:{name}", label) or 0 for name in names]

    before = kept()
    with engine(llama, **options(**AUTO, sparse_min_recall=1.0)) as llm:
        [first] = generate(llm, [PROMPT], prompt_logprobs=0)
        assert_close(of_prompt(first), by_reference)
        [second] = generate(llm, [PROMPT], prompt_logprobs=0)
        assert torch.equal(of_prompt(first), of_prompt(second))
        with schedule_of(llm) as schedule:
            [output] = generate(llm, [checkpoints.tokens(LENGTH, 1)], max_tokens=8)
        steps = assert_answers(output, schedule, llama, [AUTO_RULE] * 2)
        assert steps == [*STEPS, *[1] * 7]
        # A cached prefix answers as the steps did that made it.
        [again] = generate(llm, [checkpoints.tokens(LENGTH, 1)], max_tokens=8)
        assert again.num_cached_tokens == LENGTH // 16 * 16
        assert_same_answer(again, output)
    count, recall, keys = [now - then for now, then in zip(kept(), before, strict=True)]
    # Of its first sixteen sparse steps one, with a segment: two layers of four heads.
    assert count == 8
    assert 0 < keys < recall < count
    assert sum("DCA: sparse prefill from position 150 on" in line for line in dca_log) == 1
    assert sum("DCA: sparse prefill kept" in line for line in dca_log) == 1


def test_the_log_is_quiet_where_enough_is_kept(
    llama: Path, dca_log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a bound that is hardly below what each layer keeps."""
    count, kept, bound = RecallSampler._count, [], 0.9

    def counted(sampler: RecallSampler, coming: Any) -> None:
        count(sampler, coming)
        kept.append(float(coming.figures[0].mean()))

    monkeypatch.setattr(RecallSampler, "_count", counted)
    with engine(llama, **options(**AUTO, sparse_min_recall=bound)) as llm:
        generate(llm, [PROMPT])
    assert len(kept) == 2
    assert bound < min(kept) < bound + 0.05
    assert not any("DCA: sparse prefill kept" in line for line in dca_log)


def test_sparse_segments_after_a_cached_prefix(llama: Path) -> None:
    """Below the threshold a prefix is as fresh; past it, as the steps made it."""
    below = THRESHOLD // 16 * 16
    others = checkpoints.tokens(1000, 2)
    with engine(llama, **options(**AUTO)) as llm:
        generate(llm, [[*PROMPT[:below], *others]], max_tokens=1)
        for cached, made in ((below, [below]), (640, [below, 496])):
            with schedule_of(llm) as schedule:
                [output] = generate(llm, [PROMPT[: 640 if made == [below] else LENGTH]])
            assert output.num_cached_tokens == cached
            [own] = schedule.values()
            tokens, logprobs = of_answer(output)
            steps = [*made, *(count for _, count in own)]
            sequence = [*output.prompt_token_ids, *tokens]
            assert len(sequence) == sum(steps) + 1
            right = expected(llama, [AUTO_RULE] * 2, sequence, [*steps, 1])
            assert_close(logprobs, right[-len(tokens) :])


@pytest.mark.each_minor
def test_steps_that_hold_other_requests(llama: Path) -> None:
    """Dense ones, decode rows and other sparse ones: they change where a step cuts, no more."""
    lengths = [LENGTH, 30, 900, 140, 700]
    prompts = [checkpoints.tokens(length, seed) for seed, length in enumerate(lengths)]
    with engine(llama, **options(**AUTO)) as llm, schedule_of(llm) as schedule:
        outputs = generate(llm, prompts, max_tokens=6)
    steps = [assert_answers(each, schedule, llama, [AUTO_RULE] * 2) for each in outputs]
    assert any(512 not in own and max(own) > 256 for own in steps)


def test_preempted_requests(llama: Path) -> None:
    """What is computed anew is a prefill, in other steps."""
    prompts = [checkpoints.tokens(600, seed) for seed in range(2)]
    given = {**options(**AUTO), "num_gpu_blocks_override": 78, "max_model_len": 700}
    with (
        engine(llama, enable_prefix_caching=False, **given) as llm,
        schedule_of(llm) as schedule,
    ):
        outputs = generate(llm, prompts, max_tokens=60)
        assert preemptions(llm) > 0
    steps = [assert_answers(each, schedule, llama, [AUTO_RULE] * 2) for each in outputs]
    assert max(own[0] + own[1] for own in steps) > 600


def test_lora_adapters(llama: Path, tmp_path: Path) -> None:
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    adapter, merged = write_adapter(llama, tmp_path)
    params = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    with engine(llama, enable_lora=True, max_lora_rank=8, **options(**AUTO)) as llm:
        [output] = llm.generate(
            [{"prompt_token_ids": PROMPT}],
            params,
            lora_request=LoRARequest("adapter", 1, str(adapter)),
            use_tqdm=False,
        )
    assert_close(of_prompt(output), expected(merged, [AUTO_RULE] * 2))


def test_speculation(tmp_path: Path) -> None:
    in_a_child(_speculate, tmp_path)


def _speculate(tmp_path: Path) -> None:
    # So few words that whatever is generated was seen before, and is drafted from.
    model = checkpoints.write(tmp_path, "LlamaConfig", vocab_size=16)
    prompt = [3 + 7 * i % 13 for i in range(900)]
    lookup = {"method": "ngram", "prompt_lookup_min": 1, "prompt_lookup_max": 2}
    given = {"speculative_config": {**lookup, "num_speculative_tokens": 4}}
    with engine(model, **given, **options(**AUTO)) as llm:
        [output] = generate(llm, [prompt], max_tokens=30)
        assert drafted(llm) > 0
    tokens, logprobs = of_answer(output)
    steps = [512, 388, *[1] * 30]
    right = expected(model, [AUTO_RULE] * 2, [*prompt, *tokens], steps)
    assert_close(logprobs, right[-30:])


@pytest.mark.parametrize("method", ["draft_model", "eagle"])
def test_drafters_stay_dense(method: str, llama: Path, tmp_path: Path) -> None:
    """The model answers as it does without drafts; the drafter's layers have no rule."""
    drafter = llama if method == "draft_model" else write_eagle(tmp_path, method)
    draft = {"method": method, "model": str(drafter), "num_speculative_tokens": 3}
    with (
        engine(llama, speculative_config=draft, **options(**AUTO)) as llm,
        schedule_of(llm) as schedule,
    ):
        [output] = generate(llm, [PROMPT], max_tokens=12)
        assert drafted(llm) > 0
        runner = runner_of(llm)
        models = (runner.model, runner.drafter.model)
        rules = [
            {
                module.impl.sparse is None
                for module in model.modules()
                if hasattr(module, "attn_backend")
            }
            for model in models
        ]
        assert rules == [{False}, {True}]
    [own] = schedule.values()
    steps = [count for computed, count in own if computed < LENGTH]
    assert sum(steps) == LENGTH
    tokens, logprobs = of_answer(output)
    right = expected(llama, [AUTO_RULE] * 2, [*PROMPT, *tokens], [*steps, *[1] * len(tokens)])
    assert_close(logprobs, right[-len(tokens) :])


def test_only_dca_s_layers_of_a_hybrid(tmp_path: Path) -> None:
    model = checkpoints.write(
        tmp_path,
        "Gemma3TextConfig",
        head_dim=32,
        sliding_window=40,
        num_hidden_layers=3,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        initializer_range=0.5,
    )
    budgets = {"1": {str(head): ["vertical_and_slash", 40, 110, 1] for head in range(4)}}
    file = tmp_path / "budgets.json"
    file.write_text(json.dumps(budgets))
    dense = prompt_logprobs(model, PROMPT, **SIZES)
    for own, rule in (
        ({"sparse": "auto", "sparse_min_keys": 2 * LENGTH}, None),
        (AUTO, AUTO_RULE),
        (
            {"sparse": "checkpoint", "sparse_budgets": str(file)},
            Rule(verticals=[40] * 4, slashes=[110] * 4, continuous=True),
        ),
    ):
        given = {**options(**own), "block_size": 32, "num_gpu_blocks_override": 300}
        with engine(model, **given) as llm:
            [output] = generate(llm, [PROMPT], prompt_logprobs=0)
        # With all lines it is dense.
        right = dense if rule is None else expected(model, [rule] * 3)
        assert_close(of_prompt(output), right)
        assert ((right - dense).abs().max() > 100 * ATOL) == (rule is not None)


@pytest.mark.usefixtures("no_compiler")
def test_torch_agrees_with_the_reference(llama: Path, by_reference: torch.Tensor) -> None:
    with engine(llama, **options(**AUTO)) as llm:
        [output] = generate(llm, [PROMPT], prompt_logprobs=0)
    assert_close(of_prompt(output), by_reference)
