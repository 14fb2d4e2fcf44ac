"""Sparse prefill through the engine: as the reference answers, whatever else a step holds."""

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from prometheus_client import REGISTRY

from tests.helpers import checkpoints
from tests.helpers import sparse as helper
from tests.helpers.answers import (
    assert_same_answer,
    drafted,
    generate,
    of_answer,
    of_prompt,
    preemptions,
)
from tests.helpers.companions import write_adapter, write_eagle
from tests.helpers.inprocess import engine, in_a_child, runner_of
from tests.helpers.ranks import one_core_each
from vllm_dca.cpu import compiled
from vllm_dca.cpu.build import BuildError
from vllm_dca.reference.model import prompt_logprobs
from vllm_dca.reference.sparse import Rule

# What the project promises for fp32.
ATOL = 1e-3
SIZES = {"chunk_size": 512, "local_size": 64}  # chunks of 448
THRESHOLD = 150
STEP = 512
LENGTH = 1180
STEPS = [512, 512, 156]
AUTO = {"sparse": "auto", "sparse_coverage": 0.5, "sparse_min_keys": 64}
AUTO_RULE = Rule(coverage=0.5, min_keys=64)
# Each head of each layer has its own.
BUDGETS = [
    [(40 + 10 * head + 60 * layer, 110 + 50 * head + 30 * layer) for head in range(4)]
    for layer in range(2)
]
PROMPT = checkpoints.tokens(LENGTH)


def options(**sparse: Any) -> dict[str, Any]:
    return {
        "additional_config": {"dca": {**SIZES, "sparse_threshold": THRESHOLD, **sparse}},
        "max_num_batched_tokens": STEP,
        "max_model_len": 1300,
    }


def expected(
    model: Path,
    rules: list[Rule],
    prompt: list[int] = PROMPT,
    steps: list[int] = STEPS,
    threshold: int = THRESHOLD,
) -> torch.Tensor:
    return helper.prompt_logprobs(
        model, prompt, steps=steps, threshold=threshold, rules=rules, **SIZES
    )


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


def assert_close(found: torch.Tensor, right: torch.Tensor, atol: float = ATOL) -> None:
    torch.testing.assert_close(found.double(), right, rtol=0, atol=atol)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.write(tmp_path_factory.mktemp("llama"), "LlamaConfig")


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
        assert_same_answer(again, output, ATOL)
    count, recall, keys = [now - then for now, then in zip(kept(), before, strict=True)]
    # Of its first sixteen sparse steps one, with a segment: two layers of four heads.
    assert count == 8
    assert 0 < keys < recall < count
    assert sum("DCA: sparse prefill from position 150 on" in line for line in dca_log) == 1
    assert sum("DCA: sparse prefill kept" in line for line in dca_log) == 1


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
                module.impl.rule is None
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
    for own in (
        {"sparse": "auto", "sparse_min_keys": 2 * LENGTH},
        {"sparse": "checkpoint", "sparse_budgets": str(file)},
    ):
        given = {**options(**own), "block_size": 32, "num_gpu_blocks_override": 300}
        with engine(model, **given) as llm:
            [output] = generate(llm, [PROMPT], prompt_logprobs=0)
        error = (of_prompt(output).double() - dense).abs()
        assert error[: THRESHOLD - 1].max() <= ATOL
        # With all lines it is dense.
        assert (error.max() <= ATOL) == (own["sparse"] == "auto")


def test_torch_agrees_with_the_reference(
    llama: Path, by_reference: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_compiler() -> None:
        raise BuildError("no C++ compiler")

    monkeypatch.setattr(compiled, "library", no_compiler)
    with engine(llama, **options(**AUTO)) as llm:
        [output] = generate(llm, [PROMPT], prompt_logprobs=0)
    assert_close(of_prompt(output), by_reference)


def as_list(budgets: Any) -> Any:
    """As Qwen2.5-1M's file has it."""
    return [
        {str(head): ["vertical_and_slash", *pair, 0.5] for head, pair in enumerate(layer)}
        for layer in budgets
    ]


def as_dictionary(budgets: Any) -> Any:
    return {str(layer): heads for layer, heads in enumerate(as_list(budgets))}


def rules_of(budgets: Any) -> list[Rule]:
    return [Rule(*zip(*layer, strict=True), continuous=True) for layer in budgets]


@pytest.mark.parametrize("form", [as_list, as_dictionary])
def test_a_checkpoint_s_budgets(form: Any, tmp_path: Path) -> None:
    """A file in Qwen's own format, found by vLLM beside a config that asks for DCA."""
    asked = {**SIZES, "original_max_position_embeddings": 100}
    model = checkpoints.write(
        tmp_path,
        "Qwen2Config",
        dual_chunk_attention_config={
            **asked,
            "sparse_attention_enabled": True,
            "sparse_attention_threshold": THRESHOLD,
            "sparse_attention_last_q": 64,
        },
    )
    (tmp_path / "sparse_attention_config.json").write_text(json.dumps(form(BUDGETS)))
    rules = rules_of(BUDGETS)
    right = helper.prompt_logprobs(
        model, PROMPT, steps=STEPS, threshold=THRESHOLD, rules=rules, **asked
    )
    dense = prompt_logprobs(model, PROMPT, **asked)
    assert (right - dense).abs().max() > 100 * ATOL
    given = options() | {"additional_config": {"dca": {"sparse": "checkpoint"}}}
    with engine(model, **given) as llm:
        [output] = generate(llm, [PROMPT], prompt_logprobs=0)
    assert_close(of_prompt(output), right)


@pytest.mark.parametrize(
    "ranks",
    [
        {"tensor_parallel_size": 2},
        # vLLM has no eager pipelines on the CPU.
        pytest.param(
            {"pipeline_parallel_size": 2, "enforce_eager": False}, marks=pytest.mark.nightly
        ),
    ],
    ids=["TP", "PP"],
)
def test_each_rank_has_its_own_budgets(
    ranks: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One KV head, replicated: a second rank's query heads are the third and fourth. Or its
    layer is the second.
    """
    for name, value in one_core_each().items():
        monkeypatch.setenv(name, value)
    model = checkpoints.write(tmp_path, "LlamaConfig", num_key_value_heads=1)
    file = tmp_path / "budgets.json"
    file.write_text(json.dumps(as_list(BUDGETS)))
    given = options(sparse="checkpoint", sparse_budgets=str(file))
    with engine(model, **ranks, **given) as llm:
        [output] = generate(llm, [PROMPT], prompt_logprobs=0)
    right = expected(model, rules_of(BUDGETS))
    assert_close(of_prompt(output), right)
    by_head = [[*layer[2:], *layer[:2]] for layer in BUDGETS]
    for swapped in (by_head, BUDGETS[::-1]):
        assert (expected(model, rules_of(swapped)) - right).abs().max() > 10 * ATOL


REFUSED = [
    ({"sparse": "on"}, "must be one of off, checkpoint, auto, not 'on'"),
    ({"sparse_coverage": 0.9}, 'sparse_coverage is for "sparse": "auto"'),
    ({**AUTO, "sparse_coverage": 0}, "above 0 and up to 1, not 0"),
    ({**AUTO, "sparse_coverage": "x"}, "must be a number, not 'x'"),
    ({**AUTO, "sparse_threshold": -1}, "must be a number of tokens, not -1"),
    ({**AUTO, "sparse_min_keys": 2**31}, "must be a number of tokens, not 2147483648"),
    ({**AUTO, "sparse_budgets": "x"}, 'sparse_budgets is for "sparse": "checkpoint"'),
    ({"sparse": "checkpoint"}, "the checkpoint has no sparse_attention_config.json"),
    ({"sparse": "checkpoint", "sparse_budgets": "/nowhere"}, "/nowhere cannot be read"),
    ({**AUTO, "local_size": 320}, "of 256 tokens or more, but chunk_size 512 - local_size 320"),
    ({**AUTO, "local_size": 50}, "multiple of 64, but chunk_size 512 - local_size 50 = 462"),
]


@pytest.mark.parametrize(("given", "message"), REFUSED)
def test_refused_at_start_up(llama: Path, given: dict[str, Any], message: str) -> None:
    from vllm.engine.arg_utils import EngineArgs

    refused = options() | {"additional_config": {"dca": {**SIZES, **given}}}
    with pytest.raises(ValueError, match=re.escape(message)):
        EngineArgs(
            str(llama), attention_backend="dca", block_size=2, **refused
        ).create_engine_config()


def test_who_shares_keys_must_have_the_same_options(llama: Path, dca_log: list[str]) -> None:
    from vllm.config import KVTransferConfig
    from vllm.engine.arg_utils import EngineArgs

    EngineArgs(
        str(llama),
        attention_backend="dca",
        block_size=16,
        kv_transfer_config=KVTransferConfig(kv_connector="ExampleConnector", kv_role="kv_both"),
        **options(**AUTO),
    ).create_engine_config()
    [warning] = [line for line in dca_log if "as DCA rotated them" in line]
    assert "with these options of sparse prefill; give" in warning


def test_fp32_is_refused_on_cuda(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.engine.arg_utils import EngineArgs

    from vllm_dca.engine import refusals

    given = options(**AUTO)
    args = EngineArgs(str(llama), attention_backend="dca", block_size=16, **given)
    config = args.create_engine_config()
    config.additional_config = given["additional_config"]
    config.model_config.dtype = torch.float32
    assert refusals.refusals(config) == []
    monkeypatch.setattr(refusals.current_platform, "is_cpu", lambda: False)
    monkeypatch.setattr(refusals.current_platform, "is_cuda", lambda: True)
    [refused] = refusals.refusals(config)
    assert refused.startswith("sparse prefill in float32 on CUDA (--dtype bfloat16")
    config.model_config.dtype = torch.bfloat16
    assert refusals.refusals(config) == []


@pytest.mark.parametrize(
    ("sparse", "message"),
    [
        ({}, "has None for head 0 of layer 1"),
        ({"0": {"0": ["vertical_and_slash", 1, 1, 1]}}, "has None for head 1 of layer 0"),
        ([[["block_sparse", 1, 1, 1]] * 4] * 2, "'block_sparse', 1, 1, 1] for head 0"),
        ({"first": {}}, "must be a list, or an object by number"),
    ],
)
def test_budgets_of_every_head_are_needed(
    llama: Path, tmp_path: Path, sparse: Any, message: str
) -> None:
    from vllm.engine.arg_utils import EngineArgs

    file = tmp_path / "budgets.json"
    file.write_text(json.dumps(sparse or {"0": as_list(BUDGETS)[0]}))
    given = options(sparse="checkpoint", sparse_budgets=str(file))
    with pytest.raises(ValueError, match=re.escape(message)):
        EngineArgs(
            str(llama), attention_backend="dca", block_size=16, **given
        ).create_engine_config()


def test_layers_whose_window_is_off_need_budgets(tmp_path: Path) -> None:
    from vllm.engine.arg_utils import EngineArgs

    model = checkpoints.write_config(
        tmp_path,
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        head_dim=32,
        sliding_window=40,
        layer_types=["sliding_attention", "full_attention"],
    )
    file = tmp_path / "budgets.json"
    file.write_text(json.dumps({"1": as_list(BUDGETS)[1]}))
    given = {
        **options(sparse="checkpoint", sparse_budgets=str(file)),
        "attention_backend": "dca",
        "skip_tokenizer_init": True,
        "block_size": 16,
    }
    EngineArgs(str(model), **given).create_engine_config()
    with pytest.raises(ValueError, match="has None for head 0 of layer 0"):
        EngineArgs(str(model), disable_sliding_window=True, **given).create_engine_config()
