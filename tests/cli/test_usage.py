"""What the command line refuses, in which words, and what it prints beside."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.helpers import checkpoints
from tests.helpers.command_line import BLOCK, explained, run, without_a_platform
from vllm_dca.cli import app

each_minor = pytest.mark.each_minor

# A scaling that DCA does not know.
DEEPSEEK = json.dumps(
    {
        "rope_parameters": {
            "rope_type": "deepseek_yarn",
            "rope_theta": 1e4,
            "factor": 2.0,
            "original_max_position_embeddings": 64,
        }
    }
)


@each_minor
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--additional-config", '{"dca": {"size": 64}}'), 'unknown under "dca": size'),
        (("--block-size", "128"), "Pass --block-size 64 or smaller"),
        (("--tensor-parallel-size", "3"), "must be divisible by tensor parallel size"),
        (("--max-model-len", "0"), "max_model_len must be a positive integer"),
        (
            ("--max-model-len", "-2"),
            "max_model_len: Input should be greater than or equal to -1",
        ),
        (("--hf-overrides", "{"), "hf_overrides: Input should be a valid dictionary"),
        (("--attention-backend", "flash_attn"), "remove --attention-backend flash_attn"),
        (("--speculative-config", '{"method": "suffix"}'), "pip install arctic-inference"),
        (
            ("--hf-overrides", DEEPSEEK),
            "its rotary embedding is a DeepseekScalingRotaryEmbedding",
        ),
    ],
)
def test_refusals_are_messages(options: tuple[str, ...], message: str, llama: str) -> None:
    result = run("explain", llama, *BLOCK, *options)
    assert result.exit_code == 1
    assert message in result.stderr
    assert result.stdout == ""


@each_minor
def test_a_model_that_is_refused(tmp_path: Path) -> None:
    """tests/cli/test_kinds.py has those that are refused as they are built."""
    changes = {"word_embed_proj_dim": 64}
    model = checkpoints.write_config(tmp_path, "OPTConfig", "OPTForCausalLM", **changes)
    result = run("explain", str(model), *BLOCK)
    assert result.exit_code == 1
    assert "models without rotary positions" in result.stderr
    assert "another attention backend" in result.stderr


@each_minor
@pytest.mark.parametrize(
    "wrong",
    [
        ("--max-model-len", "long"),
        ("--max-model-len", "1.5K"),
        ("--additional-config", "[1]"),
        ("--dtype", "float7"),
        ("--window", "1"),
        ("another",),
    ],
)
def test_wrong_usage(wrong: tuple[str, ...], llama: str) -> None:
    result = run("explain", llama, *wrong)
    assert result.exit_code == 2
    assert wrong[0] in result.stderr


@each_minor
@pytest.mark.parametrize("words", [(), ("--dtype", "float32")])
def test_a_model_must_be_named(words: tuple[str, ...]) -> None:
    result = run("explain", *words)
    assert result.exit_code == 2
    assert "MODEL" in result.stderr


def test_without_a_platform() -> None:
    result = without_a_platform("explain", "any")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("vLLM found no platform")
    assert len(result.stderr.splitlines()) == 1
    assert "VLLM_TARGET_DEVICE=cpu vllm-dca explain" in result.stderr


@each_minor
def test_vllm_takes_a_cpu_where_it_is_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the message above has it, of a build for CUDA."""
    import vllm.envs
    from vllm import platforms

    monkeypatch.setattr(platforms, "vllm_version_matches_substr", lambda _: False)
    vllm.envs.disable_envs_cache()
    monkeypatch.setenv("VLLM_TARGET_DEVICE", "cpu")
    assert platforms.resolve_current_platform_cls_qualname().endswith("CpuPlatform")


@each_minor
def test_a_checkpoint_with_code_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path))
    model = checkpoints.write_config(tmp_path / "own", "LlamaConfig", "LlamaForCausalLM")
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "configuration_own.OwnConfig"}}
    (model / "config.json").write_text(json.dumps(config))
    (model / "configuration_own.py").write_text(
        "from transformers import LlamaConfig\n\n\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
    )
    # Not `run`: vLLM logs the traceback too.
    refused = CliRunner().invoke(app, ["explain", str(model), *BLOCK])
    assert refused.exit_code == 1
    assert "trust_remote_code=True" in refused.stderr
    assert (
        "--trust-remote-code"
        in explained(str(model), "--trust-remote-code", *BLOCK)["start it"][0]
    )


@each_minor
def test_a_checkpoint_that_is_not_there() -> None:
    result = run("explain", "/no/such/directory")
    assert result.exit_code == 1
    assert "/no/such/directory" in result.stderr


def test_as_a_process_it_prints_nothing_else(llama: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vllm_dca", "explain", llama, "--block-size", "16"]
    # Elsewhere than in the project's folder.
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == run("explain", llama, *BLOCK).stdout
    assert "\x1b" not in done.stdout
