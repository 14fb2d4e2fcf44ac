"""What the command line refuses, in which words, and what it prints beside."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import checkpoints
from tests.helpers.command_line import BLOCK, run

pytestmark = pytest.mark.each_minor


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--additional-config", '{"dca": {"size": 64}}'), 'unknown under "dca": size'),
        (("--block-size", "128"), "Pass --block-size 64 or smaller"),
        (("--tensor-parallel-size", "3"), "must be divisible by tensor parallel size"),
        (("--dtype", "float7"), "Input should be 'auto', 'half'"),
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


@pytest.mark.parametrize(
    ("config", "architecture", "message"),
    [
        ("OPTConfig", "OPTForCausalLM", "models without rotary positions"),
        ("Cohere2Config", "Cohere2ForCausalLM", "it has no rotary positions"),
    ],
)
def test_models_that_are_refused(
    config: str, architecture: str, message: str, tmp_path: Path
) -> None:
    changes = {
        "OPTConfig": {"word_embed_proj_dim": 64},
        "Cohere2Config": {
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 32,
        },
    }
    model = checkpoints.write_config(tmp_path, config, architecture, **changes[config])
    result = run("explain", str(model), *BLOCK)
    assert result.exit_code == 1
    assert message in result.stderr
    assert "another attention backend" in result.stderr


@pytest.mark.parametrize(
    "wrong",
    [
        ("--max-model-len", "long"),
        ("--max-model-len", "0"),
        ("--max-model-len", "-2"),
        ("--max-model-len", "1.5K"),
        ("--additional-config", "[1]"),
        ("--hf-overrides", "{"),
        ("--window", "1"),
    ],
)
def test_wrong_usage(wrong: tuple[str, ...], llama: str) -> None:
    result = run("explain", llama, *wrong)
    assert result.exit_code == 2
    assert wrong[0] in result.stderr


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
