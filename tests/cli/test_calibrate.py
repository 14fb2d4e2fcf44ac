"""`vllm-dca calibrate`: budgets that an engine takes, and that keep what was asked."""

import json
from pathlib import Path

from typer.testing import CliRunner

from tests.helpers import checkpoints
from tests.helpers.inprocess import in_a_child
from vllm_dca.cli import app
from vllm_dca.method.sparse_config import read_budgets

SIZES = {"chunk_size": 512, "local_size": 128, "sparse_threshold": 150}


def test_budgets_keep_what_was_asked(tmp_path: Path) -> None:
    in_a_child(_calibrate, tmp_path)


def _calibrate(tmp_path: Path) -> None:
    model = checkpoints.write(tmp_path / "model", "LlamaConfig")
    checkpoints.write_tokenizer(model)
    text, output = tmp_path / "text", tmp_path / "budgets.json"
    text.write_text(" ".join(f"{n * n % 997}" for n in range(600)))

    options = ("--recall", "0.7", "--output", str(output), "--text", str(text))
    dca = ("--additional-config", json.dumps({"dca": SIZES}), "--dtype", "float32")
    asked = ("calibrate", str(model), "--max-model-len", "1200", *options, *dca)
    result = CliRunner().invoke(app, asked)
    assert result.exit_code == 0, result.output
    assert f'"sparse_budgets": "{output}"' in result.stdout
    config = json.loads(output.read_text())
    budgets = read_budgets(config, [0, 1], 4)
    recalls = [entry[3] for layer in config for entry in layer.values()]
    # Of nine budgets and more some do not suffice, and not all is needed.
    assert 0.7 <= min(recalls) < max(recalls) < 1
    assert any(s < 600 for layer in budgets for _, s in layer)
