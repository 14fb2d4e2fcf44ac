"""The commands that users type, on the demo model: derived sizes, four times its window."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.quality.methods import Method
from scripts.quality.ruler.__main__ import ask
from scripts.quality.ruler.served import Served
from scripts.quality.ruler.tasks import QUESTION, TASKS
from tests.conftest import DEMO_MODEL
from tests.helpers.server import STARTED, VLLM, Server

OPTIONS = ["--max-model-len", "32768", "--enforce-eager"]
OPTIONS += ["--dtype", "float32"]  # in bf16 the model's first choice is often a tie


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("serve") / "log", DEMO_MODEL, *OPTIONS)
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
    names = ["tokens_total", "tokens_past_window_total", "chunks_sum"]
    before = [server.metric(f"vllm_dca:request_{name}") for name in names]
    status, _ = server.complete(prompt=prose[:8300], max_tokens=2, ignore_eos=True)
    assert status == 200
    after = [server.metric(f"vllm_dca:request_{name}") for name in names]
    assert [b - a for a, b in zip(before, after, strict=True)] == [8302, 8302 - 8192, 2]
    assert server.metric("vllm_dca:chunk_len") == 5120


def test_a_prompt_over_the_limit_is_refused_and_the_server_lives_on(
    server: Server, prose: list[int]
) -> None:
    status, answer = server.complete(prompt=prose[:33000], max_tokens=1)
    assert status == 400
    assert "32768" in json.dumps(answer)
    status, answer = server.complete(prompt="The capital of France is", max_tokens=3)
    assert status == 200
    assert "Paris" in answer["choices"][0]["text"]


@pytest.mark.parametrize("chat", [False, True])
def test_ruler_asks_it(server: Server, chat: bool) -> None:
    served = Served(f"{server.url}/v1", chat)
    assert "5120" in served.require(Method.parse("dca"))
    with pytest.raises(RuntimeError, match="runs DCA, and 'plain' was asked for"):
        served.require(Method.parse("plain"))
    # Several questions about one text, and several answers to one.
    for name, questions, expected in (("niah_multikey_1", 4, 1), ("niah_multivalue", 1, 4)):
        found = ask(served, name, 2048, 0, 0)
        room = 2048 - TASKS[name].answer - QUESTION
        # To a sentence or two.
        assert 0.9 * room <= found["tokens"] <= room
        assert [len(each["expected"]) for each in found["answers"]] == [expected] * questions
        assert all(each["answer"].strip() for each in found["answers"])
        # It is a text that the model can read: by chance it would find none of a million.
        if not chat:
            assert sum(each["found"] for each in found["answers"]) > 0


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
        [*command, "--model", str(DEMO_MODEL), "--attention-backend", "dca", *OPTIONS],
        capture_output=True,
        text=True,
        timeout=STARTED,
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert "DCA attends 30 layers" in run.stdout + run.stderr
    [answer] = map(json.loads, answers.read_text().splitlines())
    assert "Paris" in answer["response"]["body"]["choices"][0]["message"]["content"]
