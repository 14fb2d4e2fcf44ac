"""`vllm-dca calibrate`: budgets that an engine takes, and that keep what was asked."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from tests.helpers import checkpoints
from tests.helpers.command_line import run
from tests.helpers.ranks import one_core_each
from vllm_dca.engine.log import logger
from vllm_dca.method.sparse_config import read_budgets

SIZES = {"chunk_size": 512, "local_size": 128, "sparse_threshold": 150}


def test_budgets_keep_what_was_asked(tmp_path: Path) -> None:
    model = checkpoints.write(tmp_path / "model", "LlamaConfig")
    checkpoints.write_tokenizer(model)
    (tmp_path / "text").write_text(" ".join(f"{n * n % 997}" for n in range(600)))
    _alone(tmp_path)
    config = json.loads((tmp_path / "alone.json").read_text())
    budgets = read_budgets(config, [0, 1], 4)
    recalls = [entry[3] for layer in config for entry in layer.values()]
    # Of nine budgets and more some do not suffice, and not all is needed.
    assert 0.7 <= min(recalls) < max(recalls) < 1
    assert any(s < 600 for layer in budgets for _, s in layer)
    # What a head keeps differs in its rounding only, and no two heads keep the same.
    assert len({*recalls}) > len(recalls) // 2
    for layer, right in zip(_on_two_ranks(tmp_path), config, strict=True):
        assert {head: entry[:3] for head, entry in layer.items()} == {
            head: entry[:3] for head, entry in right.items()
        }
        for head, entry in layer.items():
            assert entry[3] == pytest.approx(right[head][3], abs=2e-4)


def _alone(folder: Path) -> None:
    output = folder / "alone.json"
    result = _calibrated(*arguments(folder, output))
    assert f'"sparse_budgets": "{output}"' in result.stdout
    assert "chunk_size 512 is over the model's window of 128 tokens" in result.stdout
    # Budgets belong to these chunks.
    assert json.dumps(SIZES)[1:-1] in result.stdout


def _on_two_ranks(folder: Path) -> Any:
    """Each has two of the heads."""
    output = folder / "two.json"
    ranks = ("--tensor-parallel-size", "2")
    _calibrated(*arguments(folder, output), *ranks, **one_core_each())
    return json.loads(output.read_text())


def _calibrated(*words: str, **environment: str) -> Result:
    """In this process, which is left as it was."""
    from vllm.distributed import cleanup_dist_env_and_memory

    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", **environment}.items():
            patch.setenv(name, value)
        try:
            result = run(*words)
        finally:
            cleanup_dist_env_and_memory()
    assert result.exit_code == 0, result.output
    return result


@pytest.mark.parametrize(
    ("wrong", "status", "message"),
    [
        (("--text", "no-such-file"), 2, "--text"),
        (("--text", "."), 2, "--text"),
        (("--output", "."), 2, "--output"),
        (("--output", "no-such-folder/budgets.json"), 2, "--output"),
        (("--output", "/proc/budgets.json"), 2, "--output"),
        (("--additional-config", '{"dca": []}'), 1, '"dca" must be an object'),
        (("--additional-config", "[1]"), 2, "--additional-config"),
        (("--text", "latin-1"), 1, "latin-1 is not UTF-8 text"),
    ],
)
def test_what_cannot_work_starts_no_engine(
    wrong: tuple[str, str],
    status: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "text").write_text("long")
    (tmp_path / "latin-1").write_bytes(b"\xe9")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("vllm_dca.engine.calibrate.LLM", _no_engine)
    result = run(*arguments(tmp_path, tmp_path / "budgets.json"), *wrong)
    assert result.exit_code == status
    assert message in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latin-1", "text"]


def _no_engine(*_: Any, **__: Any) -> None:
    raise AssertionError("an engine was started")


def test_an_engine_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        logger.warning("why it may")
        raise RuntimeError("Worker failed with error 'no room'")

    # As `calibrate` sets it for its process.
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    (tmp_path / "text").write_text("long")
    monkeypatch.setattr("vllm_dca.engine.calibrate.LLM", fail)
    result = run(*arguments(tmp_path, tmp_path / "budgets.json"))
    assert result.exit_code == 1
    assert result.stderr.strip() == "Worker failed with error 'no room'"
    assert "why it may" in result.stdout


def arguments(folder: Path, output: Path) -> list[str]:
    options = ("--recall", "0.7", "--output", str(output), "--text", str(folder / "text"))
    dca = ("--additional-config", json.dumps({"dca": SIZES}), "--dtype", "float32")
    return ["calibrate", str(folder / "model"), "--max-model-len", "1200", *options, *dca]


def test_an_engine_has_the_options_of_a_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for those that a reading has no use for."""
    given: dict[str, Any] = {}

    def llm(_: str, **options: Any) -> None:
        given.update(options)
        raise RuntimeError

    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    (tmp_path / "text").write_text("long")
    monkeypatch.setattr("vllm_dca.engine.calibrate.LLM", llm)
    ngram = '{"method": "ngram", "num_speculative_tokens": 2}'
    words = ("--trust-remote-code", "--block-size", "32", "--hf-overrides", '{"a": 1}')
    words += ("--max-num-batched-tokens", "1K", "--port", "8001", "--speculative-config", ngram)
    assert run(*arguments(tmp_path, tmp_path / "budgets.json"), *words).exit_code == 1
    wanted = {"trust_remote_code": True, "block_size": 32, "max_num_batched_tokens": 1024}
    wanted |= {"hf_overrides": {"a": 1}, "speculative_config": None, "max_model_len": 1200}
    assert wanted.items() <= given.items()
    assert "port" not in given
