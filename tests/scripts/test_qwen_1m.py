"""`qwen_1m.sh`, without a GPU: the command that it makes, as vLLM takes it."""

import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from tests.helpers import checkpoints
from tests.helpers.command_line import served
from vllm_dca.cli import app
from vllm_dca.method.sparse_cost import ATTENDING, SELECTING

EXAMPLES = Path(__file__).parents[2] / "scripts" / "examples"


def qwen_1m(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(EXAMPLES / "qwen_1m.sh"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def words_of(*arguments: str) -> list[str]:
    """What a dry run prints, behind `vllm serve`."""
    run = qwen_1m("--dry-run", *arguments)
    assert run.returncode == 0, run.stderr
    vllm, serve, *words = shlex.split(run.stdout)
    assert (vllm, serve) == ("vllm", "serve")
    return words


def serving(*arguments: str) -> Any:
    """The engine's arguments, by vLLM's own parser, of what a dry run prints."""
    return served(words_of(*arguments))


def explained(*arguments: str) -> str:
    """What `vllm-dca explain` says of what a dry run prints."""
    result = CliRunner().invoke(app, ["explain", *words_of(*arguments)])
    assert result.exit_code == 0, result.output
    return result.stdout


# As the published config.json has it.
QWEN2_5_1M = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "head_dim": None,
    "vocab_size": 152064,
    "max_position_embeddings": 1010000,
    "rope_theta": 1e7,
    "dual_chunk_attention_config": {
        "chunk_size": 262144,
        "local_size": 8192,
        "original_max_position_embeddings": 262144,
    },
}


@pytest.mark.each_minor
def test_qwen_1m_starts_a_checkpoint_with_chunk_sizes(tmp_path: Path) -> None:
    model = checkpoints.write_config(tmp_path, "Qwen2Config", "Qwen2ForCausalLM", **QWEN2_5_1M)
    arguments = serving(str(model), "2")
    assert arguments.model == str(model)
    assert arguments.attention_backend.lower() == "dca"
    assert arguments.max_model_len == 1010000
    assert arguments.tensor_parallel_size == 2
    assert arguments.enable_chunked_prefill
    assert arguments.max_num_batched_tokens == 32768
    assert arguments.gpu_memory_utilization == 0.92
    said = explained(str(model), "2")
    assert "262144 tokens, the checkpoint's dual_chunk_attention_config" in said
    assert "28 of 28 layers" in said
    assert "for one request of 1010000 tokens on each of 2 ranks" in said


def test_qwen_1m_prefills_by_the_checkpoint_s_budgets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each head of each layer by its own; its keys and its time as they are by hand."""
    from vllm_dca.engine import remap

    model = checkpoints.write_config(tmp_path, "Qwen2Config", "Qwen2ForCausalLM", **QWEN2_5_1M)
    budgets = [
        [[500 + number, 4096 - number] for number in range(28 * layer, 28 * layer + 28)]
        for layer in range(28)
    ]
    entries = [
        {str(head): ["vertical_and_slash", *pair, 0.9] for head, pair in enumerate(layer)}
        for layer in budgets
    ]
    (model / "sparse_attention_config.json").write_text(json.dumps(entries))
    of_layer, found = remap.rule_of_layer, {}

    def rule_of_layer(layer: Any, vllm_config: Any) -> Any:
        with torch.device("cpu"):  # else it has no numbers, as the model has no weights
            rule = of_layer(layer, vllm_config)
        found[layer.layer_name] = torch.stack([rule.verticals, rule.slashes], dim=1).tolist()
        return rule

    monkeypatch.setattr(remap, "rule_of_layer", rule_of_layer)
    sparse = json.dumps({"dca": {"sparse": "checkpoint"}})
    said = explained(str(model), "1", "--additional-config", sparse)
    assert found == {
        f"model.layers.{layer}.self_attn.attn": pairs for layer, pairs in enumerate(budgets)
    }
    assert re.search(r"^chunk_len +253952 tokens", said, re.M)
    assert "from position 32768 on, by the checkpoint's budgets" in said

    length, threshold = 1010000, 32768
    heads = [pair for layer in budgets for pair in layer]
    dense = (threshold / length) ** 2

    def share(kept: list[int]) -> float:
        """Of all pairs, where a row past the threshold sees so many keys, or all before it."""
        whole = [max(keys, threshold) for keys in kept]
        pairs = [
            rows**2 / 2 + (length - rows) * keys for rows, keys in zip(whole, kept, strict=True)
        ]
        return sum(pairs) / len(pairs) / (length**2 / 2)

    # Diagonals side by side have 63 keys more than there are; apart, all but the nearest 100
    # have 64 keys each.
    least = share([slashes + 63 for _, slashes in heads])
    most = share([verticals + 163 + 64 * (slashes - 100) for verticals, slashes in heads])
    shares = [float(each) for each in re.findall(r"([\d.]+)%", said)]
    assert shares == pytest.approx([100 * least, 100 * most], abs=0.1)
    # Weighed are 64 rows of a step of 8,192 tokens.
    weighing = SELECTING * 64 / 8192
    [times] = re.findall(r"^its time +([\d.]+) to ([\d.]+) of", said, re.M)
    by_hand = [dense + ATTENDING * (each - dense) + weighing for each in (least, most)]
    assert [float(each) for each in times] == pytest.approx(by_hand, abs=0.01)


def test_qwen_1m_asks_for_the_chunk_sizes_of_qwen3(tmp_path: Path) -> None:
    model = checkpoints.write_config(
        tmp_path, "Qwen3MoeConfig", "Qwen3MoeForCausalLM", max_position_embeddings=262144
    )
    sizes = {"chunk_size": 131072, "local_size": 4096}
    config = json.loads((model / "config.json").read_text())
    config |= {"max_position_embeddings": 1010000, "dual_chunk_attention_config": sizes}
    (model / "config_1m.json").write_text(json.dumps(config))

    # What the usage says of sparse prefill names no sizes.
    sparse = json.dumps({"dca": {"sparse": "checkpoint"}})
    assert f"--additional-config '{sparse}'" in qwen_1m("--help").stdout
    for more in ((), ("--additional-config", sparse)):
        run = qwen_1m("--dry-run", str(model), "2", *more)
        assert (run.returncode, run.stdout) == (1, "")
        assert "Put config_1m.json in its place" in run.stderr
    run = qwen_1m("--dry-run", "Qwen/Qwen3-30B-A3B-Instruct-2507", "2")
    assert (run.returncode, run.stdout) == (1, "")
    assert "config_1m.json: download it first" in run.stderr
    given = serving(str(model), "2", "--additional-config", json.dumps({"dca": sizes}))
    assert given.additional_config == {"dca": sizes}

    shutil.copy(model / "config_1m.json", model / "config.json")
    said = explained(str(model), "2")
    assert "131072 tokens, the checkpoint's dual_chunk_attention_config" in said


@pytest.mark.each_minor
def test_qwen_1m_lets_later_arguments_win() -> None:
    more = ["--max-model-len", "524288", "--kv-cache-dtype", "fp8", "--port", "8001"]
    arguments = serving("Qwen/Qwen2.5-14B-Instruct-1M", "4", *more)
    assert arguments.max_model_len == 524288
    assert arguments.kv_cache_dtype == "fp8"
    assert arguments.tensor_parallel_size == 4


@pytest.mark.each_minor
def test_qwen_1m_takes_smaller_steps_on_one_gpu() -> None:
    arguments = serving("Qwen/Qwen2.5-7B-Instruct-1M", "1", "--data-parallel-size", "8")
    assert arguments.max_num_batched_tokens == 8192
    assert (arguments.tensor_parallel_size, arguments.data_parallel_size) == (1, 8)


@pytest.mark.parametrize("arguments", [(), ("MODEL",), ("MODEL", "0"), ("MODEL", "--port")])
def test_qwen_1m_tells_its_usage(arguments: tuple[str, ...]) -> None:
    run = qwen_1m(*arguments)
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.startswith("Usage: qwen_1m.sh [--dry-run] MODEL GPUS")
    assert qwen_1m("--help").stdout == run.stderr


def test_qwen_1m_starts_what_it_prints(tmp_path: Path) -> None:
    """`vllm` is a stand-in here that prints its arguments: a start wants GPUs."""
    stand_in = tmp_path / "vllm"
    stand_in.write_text('#!/usr/bin/env bash\nprintf "%s\\n" vllm "$@"\n')
    stand_in.chmod(0o755)
    arguments = ["Qwen/Qwen2.5-7B-Instruct-1M", "1", "--hf-overrides", '{"a b": "c"}']
    started = subprocess.check_output(
        [str(EXAMPLES / "qwen_1m.sh"), *arguments],
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        text=True,
    )
    assert started.splitlines() == shlex.split(qwen_1m("--dry-run", *arguments).stdout)
