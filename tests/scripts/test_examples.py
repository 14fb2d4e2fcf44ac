"""The examples, run as users run them: from a shell, against a real engine or server."""

import ast
import json
import math
import os
import re
import runpy
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from transformers import AutoTokenizer

from scripts.common.corpus import load
from scripts.common.server import Server
from scripts.common.serving import free_port
from tests.conftest import DEMO_MODEL
from tests.helpers import checkpoints

EXAMPLES = Path(__file__).parents[2] / "scripts" / "examples"
OURS = {"scripts", "tests", "vllm_dca"}
# Longer than the demo model's window of 8,192 tokens: no other backend starts with it.
MAX_MODEL_LEN = 9000
TOO_LONG = "word " * 10_000
# Several chunks in a text that the CPU reads in seconds; with smaller ones this small model
# loses the fact that the document hides.
SIZES = {"dca": {"chunk_size": 1536, "local_size": 512}}
CHUNK_LEN = 1024


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_can_be_copied_out_of_the_repository(path: Path) -> None:
    modules = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules += [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            modules.append(str(node.module))
    assert not OURS & {module.partition(".")[0] for module in modules}


def prompts_file(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def written(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def test_offline_answers_as_a_server_does(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    text = load()
    rows = [
        {"id": "long", "prompt": text[:5000]},  # two chunks
        {"id": "too long", "prompt": TOO_LONG},
        {"prompt": "The capital of France is"},
        {"id": "empty", "prompt": ""},
        {"id": "é", "prompt": text[1000:1800]},
    ]
    options = {"enforce_eager": True, "additional_config": SIZES}
    output = tmp_path / "new folder" / "answers.jsonl"
    command = [sys.executable, str(EXAMPLES / "offline.py"), str(DEMO_MODEL)]
    command += [str(prompts_file(tmp_path / "prompts.jsonl", rows)), str(output)]
    command += ["--max-model-len", str(MAX_MODEL_LEN), "--max-tokens", "12"]
    command += ["--dtype", "float32", "--engine-option", json.dumps(options)]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    log = run.stdout + run.stderr
    assert run.returncode == 0, log[-5000:]
    assert "DCA attends 30 layers" in log

    # Not beside the engine, which takes as much memory.
    server = request.getfixturevalue("server")
    asked = {"model": "smollm2", "max_tokens": 12}
    answers = [server.complete(prompt=rows[at]["prompt"], **asked)[1] for at in (0, 2, 4)]
    expected = [
        {
            "text": answer["choices"][0]["text"],
            "finish_reason": answer["choices"][0]["finish_reason"],
            "num_prompt_tokens": answer["usage"]["prompt_tokens"],
        }
        for answer in answers
    ]
    assert expected[0]["num_prompt_tokens"] > CHUNK_LEN
    found = written(output)
    assert [row.pop("id") for row in found] == ["long", "too long", 3, "empty", "é"]
    [too_long] = found.pop(1).values()
    assert re.fullmatch(r"the prompt is too long: \d{5} tokens, at most 8999 fit", too_long)
    assert found.pop(2) == {"error": "the prompt is empty"}
    assert found == expected
    assert " Paris" in found[1]["text"]

    seconds = float(re.search(r"3 of 5 prompts answered in ([\d.]+) s", log)[1])
    rates = re.search(r"([\d.]+) prompt tokens/s, ([\d.]+) answer tokens/s", log)
    read = sum(row["num_prompt_tokens"] for row in expected)
    generated = sum(answer["usage"]["completion_tokens"] for answer in answers)
    assert float(rates[1]) * seconds == pytest.approx(read, rel=0.05)
    assert float(rates[2]) * seconds == pytest.approx(generated, rel=0.05)


@pytest.mark.each_minor
def test_offline_takes_a_prompt_that_leaves_room_for_one_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.distributed import cleanup_dist_env_and_memory

    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    model = checkpoints.write(tmp_path / "model", "LlamaConfig")
    checkpoints.write_tokenizer(model)  # a token a byte
    main = runpy.run_path(str(EXAMPLES / "offline.py"))["main"]
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"

    prompts.write_text('{"prompt": "a"}\n\n{"text": "b"}\n{"prompt": 4}\n')
    with pytest.raises(typer.BadParameter, match=r"no text as `prompt` in \[3, 4\]"):
        main("no such model", prompts, output, max_model_len=1000)
    for line, message in (
        ('["a"]', r'line 2 is no JSON object but \["a"\]; one would be {"prompt": "Once'),
        ('{"prompt": a}', "line 2 is no JSON: Expecting value"),
    ):
        prompts.write_text(f'{{"prompt": "a"}}\n{line}\n')
        with pytest.raises(typer.BadParameter, match=message):
            main("no such model", prompts, output, max_model_len=1000)

    prompts_file(prompts, [{"prompt": "a" * length} for length in (999, 1000)])
    try:
        main(
            str(model),
            prompts,
            output,
            max_model_len=1000,
            max_tokens=8,
            dtype="float32",
            engine_option='{"enforce_eager": true, "block_size": 16}',
        )
    finally:
        cleanup_dist_env_and_memory()
    fits, too_long = written(output)
    assert (fits["num_prompt_tokens"], fits["finish_reason"]) == (999, "length")
    assert too_long == {
        "id": 2,
        "error": "the prompt is too long: 1000 tokens, at most 999 fit",
    }


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    options = ["--served-model-name", "smollm2", "--max-model-len", str(MAX_MODEL_LEN)]
    options += ["--dtype", "float32", "--enforce-eager", "--additional-config"]
    log = tmp_path_factory.mktemp("serve") / "log"
    server = Server(log, DEMO_MODEL, *options, json.dumps(SIZES))
    try:
        server.wait()
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some pages of a novel, three chunks, with a fact in the first."""
    words = load()[:8000].split(" ")
    words.insert(len(words) // 3, "The code word for the vault is 48213. Remember it.")
    path = tmp_path_factory.mktemp("document") / "novel.txt"
    path.write_text(" ".join(words))
    return path


QUESTION = "What is the code word for the vault?"


class Client:
    """`examples/client.py` as a process, and when its answer came."""

    def __init__(self, document: Path, question: str, url: str, *options: str) -> None:
        command = [sys.executable, str(EXAMPLES / "client.py"), str(document), question]
        started = time.perf_counter()
        process = subprocess.Popen(
            [*command, "--url", url, *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # Where this is set, even a client that forgets to flush seems to stream.
            env={k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"},
        )
        pieces: list[bytes] = []
        self.arrived: list[float] = []  # seconds
        while piece := os.read(process.stdout.fileno(), 4096):
            pieces.append(piece)
            self.arrived.append(time.perf_counter() - started)
        self.answer = b"".join(pieces).decode()
        self.errors = process.communicate(timeout=60)[1].decode()
        self.exit_code = process.returncode


def test_client_streams_answers_about_a_document(server: Server, document: Path) -> None:
    asked = {"role": "user", "content": f"{document.read_text()}\n\n{QUESTION}"}
    prompt = AutoTokenizer.from_pretrained(DEMO_MODEL).apply_chat_template(
        [asked], add_generation_prompt=True, return_dict=True
    )
    length = len(prompt["input_ids"])
    url = f"{server.url}/v1"

    names = ["vllm_dca:request_chunks_sum", "vllm:time_to_first_token_seconds_sum"]
    before = [server.metric(name) for name in names]
    first = Client(document, QUESTION, url, "--max-tokens", "40")
    assert first.exit_code == 0, first.errors
    assert "48213" in first.answer
    chunks, waited = (server.metric(name) - b for name, b in zip(names, before, strict=True))
    # By DCA, in all the chunks that the document has.
    assert chunks == math.ceil(length / CHUNK_LEN) > 2
    # Token by token, and not all at the end.
    assert len(first.arrived) > 5
    [(prompt_tokens, seconds)] = re.findall(
        r"^(\d+) prompt tokens, first token after ([\d.]+) s$", first.errors
    )
    assert int(prompt_tokens) == length
    # Rounded, and with the way to the server and back.
    assert waited - 0.01 < float(seconds) < first.arrived[0] + 0.01

    # The next question finds the document in the prefix cache.
    before = server.metric("vllm:prefix_cache_hits_total")
    second = Client(document, "Who is Mr. Bennet?", url, "--max-tokens", "4")
    assert second.exit_code == 0, second.errors
    assert second.answer.strip()
    assert second.errors.endswith(" s, the answer was cut off\n")
    assert server.metric("vllm:prefix_cache_hits_total") - before > 0.9 * length


@pytest.mark.parametrize("text", [TOO_LONG, 20 * TOO_LONG], ids=["tokens", "characters"])
def test_client_says_what_works_for_a_document_that_is_too_long(
    text: str, server: Server, tmp_path: Path
) -> None:
    document = tmp_path / "long.txt"
    document.write_text(text)
    client = Client(document, QUESTION, f"{server.url}/v1")
    assert (client.exit_code, client.answer) == (1, "")
    assert client.errors.startswith("The document is too long for this server: ")
    assert f"maximum context length is {MAX_MODEL_LEN} tokens" in client.errors
    assert "vllm serve MODEL --attention-backend dca --max-model-len" in client.errors
    assert "Traceback" not in client.errors


def test_client_shows_other_refusals_as_they_are(server: Server, document: Path) -> None:
    client = Client(document, QUESTION, f"{server.url}/v1", "--model", "other")
    assert (client.exit_code, client.answer) == (1, "")
    assert "The model `other` does not exist" in client.errors
    assert "too long" not in client.errors
    assert "Traceback" not in client.errors


def test_client_without_a_server(document: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}/v1"
    client = Client(document, QUESTION, url)
    assert (client.exit_code, client.answer) == (1, "")
    assert client.errors.startswith(f"No server answers at {url}")
    assert "vllm serve MODEL --attention-backend dca" in client.errors
    assert "Traceback" not in client.errors
