"""A server of a tiny model with DCA, its processes, and what it answers."""

import contextlib
import json
import os
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil

from scripts.common.serving import VLLM, free_port, is_up
from tests.helpers import checkpoints

STARTED_S = 600
ENDED_S = 120
# Past the model's window of 128 tokens, and past its chunks.
PROMPTS = [checkpoints.tokens(200 + 37 * i, seed=i) for i in range(6)]
ANSWER = 40


class UnmetError(AssertionError):
    """What had to be was not."""


def require(met: object, otherwise: str) -> None:
    """Raise `UnmetError` unless it is so."""
    if not met:
        raise UnmetError(otherwise)


def write_model(directory: Path) -> None:
    checkpoints.write_tokenizer(checkpoints.write(directory, "LlamaConfig"))


class Served:
    """`vllm serve MODEL --attention-backend dca`, its output in a file."""

    def __init__(
        self, model: Path, *options: str, provider: str | None = None, **environment: str
    ) -> None:
        dca = {"chunk_size": 96, "local_size": 32, "prefill_provider": provider}
        port = free_port()
        self.url, self.model = f"http://127.0.0.1:{port}", str(model)
        self.output = tempfile.NamedTemporaryFile("w+", suffix=".log")  # noqa: SIM115
        command = [VLLM, "serve", self.model, f"--port={port}", "--host=127.0.0.1"]
        command += [
            "--attention-backend=dca",
            f"--additional-config={json.dumps({'dca': dca})}",
        ]
        command += ["--dtype=float32", "--enforce-eager", "--block-size=16"]
        command += ["--max-model-len=8192", *options]
        self.process = psutil.Popen(
            command,
            stdout=self.output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", **environment},
        )

    def log(self) -> str:
        return Path(self.output.name).read_text()

    def wait(self) -> None:
        deadline = time.monotonic() + STARTED_S
        while not is_up(self.url):
            ended = self.process.poll() is not None
            errors = [line for line in self.log().splitlines() if "Error" in line]
            why = "\n".join(["no start:", *errors])
            require(not ended and time.monotonic() < deadline, why)
            time.sleep(0.5)

    def wait_for_the_end(self) -> int:
        """Its status."""
        try:
            return int(self.process.wait(ENDED_S))
        except psutil.TimeoutExpired:
            raise UnmetError(f"it did not end in {ENDED_S} seconds") from None

    def children(self, name: str = "") -> list[psutil.Process]:
        """Its processes of this name."""
        found = self.process.children(recursive=True)
        return [each for each in found if name in " ".join(each.cmdline())]

    def ask(self, prompt: list[int], tokens: int = ANSWER) -> tuple[int, list[int]]:
        """A status, 0 if the connection broke, and a greedy answer's tokens."""
        body = {"model": self.model, "prompt": prompt, "max_tokens": tokens, "temperature": 0}
        body |= {"ignore_eos": True, "return_token_ids": True}
        request = urllib.request.Request(
            f"{self.url}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request) as response:
                return response.status, json.load(response)["choices"][0]["token_ids"]
        except urllib.error.HTTPError as error:
            return error.code, []
        except OSError:
            return 0, []

    def answers(self, together: bool = False) -> list[list[int]]:
        """To all prompts, one by one or together."""
        with ThreadPoolExecutor(len(PROMPTS) if together else 1) as threads:
            found = list(threads.map(self.ask, PROMPTS))
        require({status for status, _ in found} == {200}, f"statuses {[s for s, _ in found]}")
        return [tokens for _, tokens in found]

    def metric(self, name: str) -> float:
        with urllib.request.urlopen(f"{self.url}/metrics") as response:
            lines = response.read().decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name + "{"))

    def stop(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended
            children = self.children()
            self.process.terminate()
            _, alive = psutil.wait_procs([self.process, *children], ENDED_S)
            for process in alive:
                process.kill()
        self.output.close()


@contextlib.contextmanager
def serving(
    model: Path, *options: str, provider: str | None = None, **environment: str
) -> Iterator[Served]:
    """A server that is up."""
    [served] = started = [Served(model, *options, provider=provider, **environment)]
    with _stopped(started):
        served.wait()
        yield served


@contextlib.contextmanager
def serving_two(model: Path, **environment: str) -> Iterator[Sequence[Served]]:
    """Two that were started at once, and are up."""
    both = [Served(model, **environment) for _ in range(2)]
    with _stopped(both):
        for served in both:
            served.wait()
        yield both


@contextlib.contextmanager
def refused(model: Path, provider: str, **environment: str) -> Iterator[str]:
    """The log of a server that does not start."""
    served = Served(model, provider=provider, **environment)
    with _stopped([served]):
        status = served.wait_for_the_end()
        require(status != 0, "it ended well")
        yield served.log()


@contextlib.contextmanager
def _stopped(servers: Sequence[Served]) -> Iterator[None]:
    try:
        yield
    finally:
        for served in servers:
            served.stop()


Facts = dict[str, Any]
