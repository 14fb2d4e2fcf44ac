"""The commands that users type, on the demo model: derived sizes, four times its window."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import DEMO_MODEL, free_port

VLLM = [str(Path(sys.executable).with_name("vllm"))]
DCA = ["--attention-backend", "dca", "--max-model-len", "32768", "--enforce-eager"]
DCA += ["--dtype", "float32"]  # in bf16 the model's first choice is often a tie
STARTED = 300  # seconds


class Server:
    """`vllm serve` on a free port, its output in a file."""

    def __init__(self, log: Path) -> None:
        port = str(free_port())
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        command = [*VLLM, "serve", str(DEMO_MODEL), "--port", port, "--host", "127.0.0.1", *DCA]
        with log.open("w") as output:
            self.process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )

    def wait(self) -> None:
        deadline = time.monotonic() + STARTED
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log.read_text()[-5000:]
            try:
                with urllib.request.urlopen(f"{self.url}/health"):
                    return
            except OSError:
                time.sleep(1)
        raise TimeoutError(self.log.read_text()[-5000:])

    def complete(self, **body: Any) -> tuple[int, dict[str, Any]]:
        request = urllib.request.Request(
            f"{self.url}/v1/completions",
            json.dumps({"model": str(DEMO_MODEL), "temperature": 0, **body}).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def stop(self) -> None:
        os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("serve") / "log")
    try:
        server.wait()
        yield server
    finally:
        server.stop()


def test_it_says_once_what_it_does(server: Server) -> None:
    log = server.log.read_text()
    settled = (
        "DCA: chunk_size 6144, local_size 1024 (chunks of 5120 tokens), derived from the "
        "trained window of 8192 tokens, no temperature; up to 32768 tokens, 4.0 times the "
        "model's 8192."
    )
    attended = "DCA attends 30 layers: model.layers.0.self_attn.attn .. model.layers.29"
    assert log.count(settled) == 1
    assert log.count(attended) == 1


def test_a_prompt_past_the_window_is_answered(server: Server, prose: list[int]) -> None:
    status, answer = server.complete(prompt=prose[:8300], max_tokens=2, ignore_eos=True)
    assert status == 200
    assert answer["usage"] == answer["usage"] | {"prompt_tokens": 8300, "completion_tokens": 2}


def test_metrics_tell_what_is_past_the_window(server: Server, prose: list[int]) -> None:
    def metric(name: str) -> float:
        with urllib.request.urlopen(f"{server.url}/metrics") as response:
            lines = response.read().decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name + "{"))

    names = ["tokens_total", "tokens_past_window_total", "chunks_sum"]
    before = [metric(f"vllm_dca:request_{name}") for name in names]
    status, _ = server.complete(prompt=prose[:8300], max_tokens=2, ignore_eos=True)
    assert status == 200
    after = [metric(f"vllm_dca:request_{name}") for name in names]
    assert [b - a for a, b in zip(before, after, strict=True)] == [8302, 8302 - 8192, 2]
    assert metric("vllm_dca:chunk_len") == 5120


def test_a_prompt_over_the_limit_is_refused_and_the_server_lives_on(
    server: Server, prose: list[int]
) -> None:
    status, answer = server.complete(prompt=prose[:33000], max_tokens=1)
    assert status == 400
    assert "32768" in json.dumps(answer)
    status, answer = server.complete(prompt="The capital of France is", max_tokens=3)
    assert status == 200
    assert "Paris" in answer["choices"][0]["text"]


def test_run_batch(tmp_path: Path) -> None:
    requests, answers = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    body = {
        "model": str(DEMO_MODEL),
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "max_tokens": 10,
        "temperature": 0,
    }
    line = {"custom_id": "one", "method": "POST", "url": "/v1/chat/completions", "body": body}
    requests.write_text(json.dumps(line) + "\n")
    command = [*VLLM, "run-batch", "-i", str(requests), "-o", str(answers)]
    run = subprocess.run(
        [*command, "--model", str(DEMO_MODEL), *DCA],
        capture_output=True,
        text=True,
        timeout=STARTED,
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert "DCA attends 30 layers" in run.stdout + run.stderr
    [answer] = map(json.loads, answers.read_text().splitlines())
    assert "Paris" in answer["response"]["body"]["choices"][0]["message"]["content"]
