"""The commands that users type, on the demo model: derived sizes, four times its window."""

import dataclasses
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scripts.common.server import Server
from scripts.common.serving import STARTING_S, VLLM, free_port
from scripts.quality.methods import Method
from scripts.quality.ruler.__main__ import ask
from scripts.quality.ruler.served import Served
from scripts.quality.ruler.tasks import QUESTION, TASKS
from tests.conftest import DEMO_MODEL

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
        "trained window of 8192 tokens, no attention temperature; up to 32768 tokens, 4.0 "
        "times the model's 8192."
    )
    attended = "DCA attends 30 layers: model.layers.0.self_attn.attn .. model.layers.29"
    assert log.count(settled) == 1
    assert log.count(attended) == 1


def test_a_prompt_past_the_window_is_answered_and_counted(
    server: Server, prose: list[int]
) -> None:
    names = ["tokens_total", "tokens_past_window_total", "chunks_sum"]
    before = [server.metric(f"vllm_dca:request_{name}") for name in names]
    status, answer = server.complete(prompt=prose[:8300], max_tokens=2, ignore_eos=True)
    assert status == 200
    assert answer["usage"] == answer["usage"] | {"prompt_tokens": 8300, "completion_tokens": 2}
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


PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
BAD_COMPLETIONS: dict[str, dict[str, Any]] = {
    "an empty prompt": {"prompt": ""},
    "a prompt of no tokens": {"prompt": []},
    "a prompt of a wrong type": {"prompt": {"text": 5}},
    "a token that the vocabulary lacks": {"prompt": [5, 10**6]},
    "a token of more than 64 bits": {"prompt": [5, 10**30]},
    "a negative token": {"prompt": [5, -5]},
    "a negative max_tokens": {"max_tokens": -5},
    "more tokens than the context has": {"max_tokens": 10**9},
    "min_tokens over max_tokens": {"min_tokens": 9},
    "a negative temperature": {"temperature": -1},
    "a temperature that is no number": {"temperature": float("nan")},
    "top_p over 1": {"top_p": 2},
    "top_k under -1": {"top_k": -7},
    "no answers": {"n": 0},
    "a negative n": {"n": -3},
    "a huge n": {"n": 10**9},
    "several greedy answers": {"n": 2},
    "negative logprobs": {"logprobs": -3},
    "huge logprobs": {"logprobs": 10**6},
    "huge prompt_logprobs": {"prompt_logprobs": 10**6},
    "a penalty that is too large": {"presence_penalty": 100},
    "a repetition_penalty of 0": {"repetition_penalty": 0},
    "a bias of a token that the vocabulary lacks": {"logit_bias": {"1000000": 5}},
    "an adapter that is not there": {"model": "no-such-adapter"},
    "a regular expression that is none": {"structured_outputs": {"regex": "("}},
    "a schema that is none": {"structured_outputs": {"json": {"type": "nonsense"}}},
    "an empty salt": {"cache_salt": ""},
    "an unknown format": {"response_format": {"type": "nonsense"}},
}
BAD_CHATS: dict[str, Any] = {
    "no messages": [],
    "a picture": [{"role": "user", "content": [PICTURE]}],
    "a message of a wrong type": ["hello"],
    "a message without a role": [{"content": "hello"}],
}
BAD_BODIES = {
    "cut-off JSON": b'{"prompt": [5, 6',
    "no JSON": b"\x00\xff" * 100,
    "a list": b"[1, 2]",
    "nothing": b"",
}


def test_bad_requests_are_refused_and_change_nothing(server: Server, prose: list[int]) -> None:
    question = {"prompt": prose[:1500], "max_tokens": 8, "return_token_ids": True}
    _, before = server.complete(**question)
    # What is spoilt below is good as it is.
    assert server.complete(prompt=[5, 6, 7], max_tokens=2)[0] == 200
    assert server.chat([{"role": "user", "content": "hello"}], max_tokens=2)[0] == 200
    found = {
        what: server.complete(**{"prompt": [5, 6, 7], "max_tokens": 2, **body})
        for what, body in BAD_COMPLETIONS.items()
    }
    found |= {what: server.chat(messages) for what, messages in BAD_CHATS.items()}
    found |= {what: server.post("/v1/completions", body) for what, body in BAD_BODIES.items()}
    for what, (status, answer) in found.items():
        assert 400 <= status < 500, (what, status, answer)
        assert answer["error"]["message"], what
    status, after = server.complete(**question)
    assert status == 200
    assert after["choices"][0]["token_ids"] == before["choices"][0]["token_ids"]


@pytest.mark.parametrize("chat", [False, True])
def test_ruler_asks_it(server: Server, chat: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    served = Served(f"{server.url}/v1", chat)
    assert "5120" in served.require(Method.parse("dca"))
    with pytest.raises(RuntimeError, match="runs DCA, and 'plain' was asked for"):
        served.require(Method.parse("plain"))
    # Several questions about one text, and several answers to one.
    asked = (("niah_multikey_1", 4, 1), ("niah_multivalue", 1, 4))
    for name, questions, expected in asked[:1] if chat else asked:
        task = dataclasses.replace(TASKS[name], answer=48)  # a code or four
        monkeypatch.setitem(TASKS, name, task)
        found = ask(served, name, 2048, 0, 0)
        room = 2048 - task.answer - QUESTION
        # To a sentence or two.
        assert 0.9 * room <= found["tokens"] <= room
        assert [len(each["expected"]) for each in found["answers"]] == [expected] * questions
        assert all(each["answer"].strip() for each in found["answers"])
        # It is a text that the model can read: by chance it would find none of a million.
        if not chat:
            assert sum(each["found"] for each in found["answers"]) > 0


def test_a_server_that_cannot_start_says_why_and_exits() -> None:
    command = [VLLM, "serve", str(DEMO_MODEL), "--port", str(free_port())]
    command += ["--attention-backend", "dca", "--block-size", "48"]
    command += ["--additional-config", '{"dca": {"chunk_size": 96, "local_size": 32}}']
    run = subprocess.run(command, capture_output=True, text=True, timeout=STARTING_S)
    assert run.returncode != 0
    assert "pass --block-size 2 or 4 or 8 or 16 or 32 or 64" in run.stdout + run.stderr


@pytest.mark.nightly
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
    command = [VLLM, "run-batch", "-i", str(requests), "-o", str(answers)]
    run = subprocess.run(
        [*command, "--model", str(DEMO_MODEL), "--attention-backend", "dca", *OPTIONS],
        capture_output=True,
        text=True,
        timeout=STARTING_S,
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert "DCA attends 30 layers" in run.stdout + run.stderr
    [answer] = map(json.loads, answers.read_text().splitlines())
    assert "Paris" in answer["response"]["body"]["choices"][0]["message"]["content"]
