"""Batches on Ray Data: they go on from what is there, and nothing is answered twice.

The nightly tests kill a replica, or the driver, in the midst of one.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.helpers import checkpoints, inprocess
from tests.helpers.on_ray import OPTIONS, write_model

ROOT = Path(__file__).parents[2]
# Tokens of an answer. One is so long that a kill lands in the midst of it.
SHORT, LONG = 48, 400


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


class Batch:
    """`examples/ray_batch.py` with replicas of one core and one prompt at a time."""

    def __init__(
        self,
        model: Path,
        prompts: Path,
        output: Path,
        log: Path,
        *,
        max_tokens: int,
        replicas: int,
    ) -> None:
        self.log = log
        command = [sys.executable, str(ROOT / "scripts/examples/ray_batch.py"), str(model)]
        command += [str(prompts), str(output), "--max-model-len=1024"]
        command += [f"--max-tokens={max_tokens}"]
        command += [f"--replicas={replicas}", "--cores=1", "--batch-size=2", "--batches=1"]
        command += ["--engine-option", json.dumps({**OPTIONS, "max_num_seqs": 1})]
        environment = {**os.environ, "RAY_ADDRESS": "local", "VLLM_CPU_KVCACHE_SPACE": "1"}
        with log.open("w") as file:
            self.process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env=environment
            )

    def replicas(self) -> dict[int, psutil.Process]:
        """Ray's actors. What one of them forks bears its name until it runs its own program."""
        found, parents = {}, {}
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                name, parent = " ".join(process.cmdline()), process.ppid()
            except psutil.Error:  # it ended meanwhile
                continue
            if name.startswith("ray::MapWorker(MapBatches(vLLMEngineStageUDF))"):
                found[process.pid], parents[process.pid] = process, parent
        return {pid: process for pid, process in found.items() if parents[pid] not in found}

    def wait(self) -> str:
        try:
            self.process.wait(440)
        finally:
            self.process.kill()
        return self.log.read_text()


def ask(model: Path, prompts: Path, max_tokens: int) -> dict[str, list[int]]:
    """Write twelve prompts; their answers by a lone engine."""
    from vllm import SamplingParams

    tokens = {f"request {i}": checkpoints.tokens(300 + i, seed=i) for i in range(12)}
    prompts.write_text(
        "".join(json.dumps({"id": i, "prompt_token_ids": t}) + "\n" for i, t in tokens.items())
    )
    with inprocess.engine(model, **OPTIONS, max_num_seqs=1) as llm:
        answers = llm.generate(
            [{"prompt_token_ids": t} for t in tokens.values()],
            SamplingParams(temperature=0, max_tokens=max_tokens, detokenize=False),
            use_tqdm=False,
        )
    return {i: list(a.outputs[0].token_ids) for i, a in zip(tokens, answers, strict=True)}


def written(output: Path) -> list[dict[str, Any]]:
    return [row for path in output.iterdir() for row in pq.read_table(path).to_pylist()]


def leave(output: Path, expected: dict[str, list[int]]) -> list[str]:
    """Write what a run left that died: four answers, and a file that it was writing."""
    output.mkdir()
    kept = list(expected)[3:7]
    row = {"text": "kept", "num_prompt_tokens": 1}
    left = pa.Table.from_pylist([{"id": i, "token_ids": expected[i], **row} for i in kept])
    pq.write_table(left, output / "left.parquet")
    whole = (output / "left.parquet").read_bytes()
    (output / "half.parquet").write_bytes(whole[:-100])
    return kept


def assert_answered(
    batch: Batch, output: Path, expected: dict[str, list[int]], kept: list[str]
) -> str:
    """All prompts, and none of those that were answered already; the log."""
    log = batch.wait()
    assert batch.process.returncode == 0, log[-5000:]
    assert "12 prompts, 4 answered already" in log
    assert "12 of 12 prompts answered, 0 twice" in log
    assert not (output / "half.parquet").exists()
    rows = written(output)
    assert sorted(row["id"] for row in rows) == sorted(expected)
    assert {row["id"]: row["token_ids"] for row in rows} == expected
    assert {row["id"] for row in rows if row["text"] == "kept"} == set(kept)
    return log


def test_a_batch_goes_on_from_what_is_there(model: Path, tmp_path: Path) -> None:
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "output"
    expected = ask(model, prompts, SHORT)
    kept = leave(output, expected)
    given = {"max_tokens": SHORT, "replicas": 1}
    batch = Batch(model, prompts, output, tmp_path / "log", **given)
    assert_answered(batch, output, expected, kept)

    files = {path: path.stat().st_mtime_ns for path in output.iterdir()}
    again = Batch(model, prompts, output, tmp_path / "log again", **given)
    assert "12 prompts, 12 answered already" in again.wait()
    assert again.process.returncode == 0
    assert {path: path.stat().st_mtime_ns for path in output.iterdir()} == files


@pytest.mark.nightly
def test_a_batch_outlives_a_replica(model: Path, tmp_path: Path) -> None:
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "output"
    expected = ask(model, prompts, LONG)
    kept = leave(output, expected)
    batch = Batch(model, prompts, output, tmp_path / "log", max_tokens=LONG, replicas=2)
    deadline = time.monotonic() + 200
    seen: set[int] = set()
    killed = None
    while batch.process.poll() is None and time.monotonic() < deadline:
        replicas = batch.replicas()
        seen |= set(replicas)
        started = len(replicas) == 2 and len(set(output.glob("*.parquet"))) > 1
        if killed is None and started:
            killed = next(iter(replicas))
            replicas[killed].kill()
        time.sleep(0.1)
    log = assert_answered(batch, output, expected, kept)
    assert killed is not None
    assert "will be retried" in log  # it had work when it was killed
    assert len(seen) == 3, "a replica is started for the one that was killed"


@pytest.mark.nightly
def test_a_batch_whose_driver_dies_is_gone_on_with(model: Path, tmp_path: Path) -> None:
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "output"
    expected = ask(model, prompts, LONG)

    given = {"max_tokens": LONG, "replicas": 2}
    batch = Batch(model, prompts, output, tmp_path / "log", **given)
    deadline = time.monotonic() + 200
    while len(list(output.glob("*.parquet"))) < 2:
        assert batch.process.poll() is None, batch.log.read_text()[-5000:]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    left = psutil.Process(batch.process.pid).children(recursive=True)
    batch.process.kill()
    # Ray ends the engines; its own small agents it may leave (`ray stop` ends them).
    _, alive = psutil.wait_procs(left, 60)
    names = [process.name() for process in alive]
    for process in alive:
        process.kill()
    assert not [name for name in names if "Map" in name or "VLLM" in name], names
    found = 0
    for path in output.glob("*.parquet"):
        # What was being written has no footer yet.
        with contextlib.suppress(pa.ArrowInvalid):
            found += pq.read_metadata(path).num_rows
    assert 0 < found < len(expected)

    again = Batch(model, prompts, output, tmp_path / "log again", **given)
    log = again.wait()
    assert again.process.returncode == 0, log[-5000:]
    assert f"12 prompts, {found} answered already" in log
    assert "12 of 12 prompts answered, 0 twice" in log
    assert sorted(row["id"] for row in written(output)) == sorted(expected)
    assert {row["id"]: row["token_ids"] for row in written(output)} == expected
