"""Servers of a tiny model with DCA, and what they answer."""

import contextlib
import http.client
import json
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil

from scripts.common.server import Server
from scripts.common.serving import STARTING_S
from tests.helpers import checkpoints

ENDED_S = 120
# Past the model's window of 128 tokens, and past its chunks.
PROMPTS = [checkpoints.tokens(200 + 37 * i, seed=i) for i in range(6)]
ANSWER = 40

Facts = dict[str, Any]


class UnmetError(AssertionError):
    """What had to be was not."""


def require(met: object, otherwise: str) -> None:
    """Raise `UnmetError` unless it is so."""
    if not met:
        raise UnmetError(otherwise)


def write_model(directory: Path) -> None:
    checkpoints.write_tokenizer(checkpoints.write(directory, "LlamaConfig"))


def ask(server: Server, prompt: list[int], tokens: int) -> tuple[int, list[int]]:
    """A status, 0 if the connection broke, and a greedy answer's tokens."""
    asked = {"prompt": prompt, "max_tokens": tokens}
    try:
        status, said = server.complete(**asked, ignore_eos=True, return_token_ids=True)
    except (OSError, http.client.HTTPException):
        return 0, []
    return status, said["choices"][0]["token_ids"] if status == 200 else []


def answers(server: Server, tokens: int = ANSWER, together: bool = False) -> list[list[int]]:
    """To all prompts, one by one or together."""
    with ThreadPoolExecutor(len(PROMPTS) if together else 1) as threads:
        found = list(threads.map(lambda prompt: ask(server, prompt, tokens), PROMPTS))
    require({status for status, _ in found} == {200}, f"statuses {[s for s, _ in found]}")
    return [said for _, said in found]


def status_at_the_end(server: Server, seconds: float = ENDED_S) -> int:
    try:
        return int(server.process.wait(seconds))
    except psutil.TimeoutExpired:
        raise UnmetError(f"it did not end in {seconds} seconds") from None


@contextlib.contextmanager
def serving(
    model: Path, *options: str, provider: str | None = None, **environment: str
) -> Iterator[Server]:
    """A server that is up."""
    with _started(1, model, *options, provider=provider, **environment) as [server]:
        server.wait()
        yield server


@contextlib.contextmanager
def serving_two(model: Path, **environment: str) -> Iterator[Sequence[Server]]:
    """Two that were started at once, and are up."""
    with _started(2, model, **environment) as both:
        for server in both:
            server.wait()
        yield both


@contextlib.contextmanager
def refused(model: Path, provider: str, **environment: str) -> Iterator[str]:
    """The log of a server that does not start."""
    with _started(1, model, provider=provider, **environment) as [server]:
        # It ends where others are up, which takes as long as a start.
        require(status_at_the_end(server, STARTING_S) != 0, "it ended well")
        yield server.log.read_text()


@contextlib.contextmanager
def _started(
    number: int, model: Path, *options: str, provider: str | None = None, **environment: str
) -> Iterator[Sequence[Server]]:
    """Servers that are not up yet, in fp32; they are stopped at the end."""
    dca = {"chunk_size": 96, "local_size": 32, "prefill_provider": provider}
    common = [f"--additional-config={json.dumps({'dca': dca})}", "--dtype=float32"]
    common += ["--enforce-eager", "--block-size=16", "--max-model-len=8192"]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", **environment}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        servers = []
        for log in (Path(folder) / f"{index}.log" for index in range(number)):
            servers.append(Server(log, model, *common, *options, **environment))
            stack.callback(servers[-1].stop)
        yield servers
