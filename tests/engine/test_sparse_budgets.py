"""Sparse prefill at start-up: a checkpoint's budgets, and what is refused."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from scripts.common.record import ROOT
from tests.helpers import checkpoints
from tests.helpers import sparse as helper
from tests.helpers.answers import ATOL, assert_close, generate, of_prompt
from tests.helpers.inprocess import engine, settle
from tests.helpers.ranks import one_core_each
from tests.helpers.sparse_served import (
    AUTO,
    PROMPT,
    SIZES,
    STEPS,
    THRESHOLD,
    expected,
    options,
)
from vllm_dca.method.sparse_config import read_budgets
from vllm_dca.reference.model import prompt_logprobs
from vllm_dca.reference.sparse import Rule

# Each head of each layer has its own.
BUDGETS = [
    [(40 + 10 * head + 60 * layer, 110 + 50 * head + 30 * layer) for head in range(4)]
    for layer in range(2)
]


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


def test_budgets_that_other_rows_select_for_are_told(
    tmp_path: Path, dca_log: list[str]
) -> None:
    model = checkpoints.write_config(
        tmp_path,
        "Qwen2Config",
        "Qwen2ForCausalLM",
        dual_chunk_attention_config={**SIZES, "sparse_attention_last_q": 128},
    )
    (tmp_path / "sparse_attention_config.json").write_text(json.dumps(as_list(BUDGETS)))
    settle(model, additional_config={"dca": {"sparse": "checkpoint"}})
    [warning] = [line for line in dca_log if "sparse_attention_last_q" in line]
    assert "128 rows select. Here the last 64 of a segment do." in warning


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
    ({**AUTO, "sparse_min_recall": True}, "must be a number, not True"),
    ({**AUTO, "sparse_threshold": -1}, "must be a number of tokens, not -1"),
    ({**AUTO, "sparse_min_keys": 2**31}, "must be 2147483647 tokens at most"),
    ({**AUTO, "sparse_budgets": "x"}, 'sparse_budgets is for "sparse": "checkpoint"'),
    ({"sparse": "checkpoint"}, "the checkpoint has no sparse_attention_config.json"),
    ({"sparse": "checkpoint", "sparse_budgets": "/nowhere"}, "/nowhere cannot be read"),
    ({**AUTO, "local_size": 320}, "of 256 tokens or more, but chunk_size 512 - local_size 320"),
    (
        {**AUTO, "local_size": 50},
        "chunk_size 512 - local_size 50 = 462: choose another, such as local_size 64.",
    ),
]


@pytest.mark.parametrize(("given", "message"), REFUSED)
def test_refused_at_start_up(llama: Path, given: dict[str, Any], message: str) -> None:
    refused = options() | {"additional_config": {"dca": {**SIZES, **given}}}
    with pytest.raises(ValueError, match=re.escape(message)):
        settle(llama, block_size=2, **refused)


def test_defaults_are_those_of_the_documentation(llama: Path) -> None:
    given = options() | {"additional_config": {"dca": {**SIZES, "sparse": "auto"}}}
    settled = settle(llama, **given).additional_config["dca"]["sparse"]
    page = (ROOT / "docs/sparse.md").read_text()
    for name in ("threshold", "coverage", "min_keys"):
        [default] = re.findall(rf"^\| `sparse_{name}` \|[^|]*\|([^|]*)\|", page, re.M)
        assert default.split()[-1] == f"{settled[name]:,}"


def test_who_shares_keys_must_have_the_same_options(llama: Path, dca_log: list[str]) -> None:
    from vllm.config import KVTransferConfig

    shared = KVTransferConfig(kv_connector="ExampleConnector", kv_role="kv_both")
    settle(llama, kv_transfer_config=shared, **options(**AUTO))
    [warning] = [line for line in dca_log if "as DCA rotated them" in line]
    assert "with these options of sparse prefill. Give" in warning


def test_a_start_says_what_never_gets_sparse(llama: Path, dca_log: list[str]) -> None:
    """Prompts that end before it begins, and pieces that are too short."""
    given = options(**AUTO)
    settle(llama, **given)
    assert not [line for line in dca_log if "no prompt" in line or "dense: only" in line]
    settle(llama, **given | {"max_model_len": THRESHOLD + 255})
    [warning] = [line for line in dca_log if "no prompt" in line]
    assert f"up to {THRESHOLD + 255} tokens reaches sparse prefill, which begins" in warning
    settle(llama, long_prefill_token_threshold=255, **given)
    settle(llama, long_prefill_token_threshold=256, **given)
    [warning] = [line for line in dca_log if "dense: only a prompt alone is sparse" in line]
    assert "--long-prefill-token-threshold 255 cuts" in warning
    with pytest.raises(ValueError, match=r"steps of 256 tokens or more, and .* is 255"):
        settle(llama, **given | {"max_num_batched_tokens": 255})


def test_fp32_is_refused_on_cuda(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_dca.engine import refusals

    given = options(**AUTO)
    config = settle(llama, **given)
    config.additional_config = given["additional_config"]
    assert config.model_config.dtype == torch.float32
    assert refusals.refusals(config) == []
    monkeypatch.setattr(refusals.current_platform, "is_cpu", lambda: False)
    monkeypatch.setattr(refusals.current_platform, "is_cuda", lambda: True)
    [refused] = refusals.refusals(config)
    assert refused.startswith("sparse prefill in float32 on CUDA (use --dtype bfloat16")
    config.additional_config = {"dca": {**given["additional_config"]["dca"], "sparse": "off"}}
    assert refusals.refusals(config) == []
    config.additional_config = given["additional_config"]
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
    file = tmp_path / "budgets.json"
    file.write_text(json.dumps(sparse or {"0": as_list(BUDGETS)[0]}))
    given = options(sparse="checkpoint", sparse_budgets=str(file))
    with pytest.raises(ValueError, match=re.escape(message)):
        settle(llama, **given)


def test_budgets_need_to_know_which_layers_attend() -> None:
    with pytest.raises(ValueError, match="layer_types name none of full attention"):
        read_budgets(as_list(BUDGETS), [], 4)


def test_budgets_are_for_as_many_heads_as_the_layer_has(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Laguna's layers may have more than the config says; here the ranks do."""
    from vllm_dca.engine import sparse_layers

    monkeypatch.setattr(sparse_layers, "get_tensor_model_parallel_world_size", lambda: 2)
    file = tmp_path / "budgets.json"
    file.write_text(json.dumps(as_list(BUDGETS)))
    given = options(sparse="checkpoint", sparse_budgets=str(file))
    message = "layers.0.self_attn.attn: it has 8 query heads, .* read for 4. DCA needs a budget"
    with pytest.raises(NotImplementedError, match=message), engine(llama, **given):
        pass


def test_layers_whose_window_is_off_need_budgets(tmp_path: Path) -> None:
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
    given = options(sparse="checkpoint", sparse_budgets=str(file))
    settle(model, **given)
    with pytest.raises(ValueError, match="has None for head 0 of layer 0"):
        settle(model, disable_sliding_window=True, **given)
