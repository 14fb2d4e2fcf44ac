"""`vllm serve` with DCA, as users start it, its processes and its answers."""

import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import psutil

from scripts.common.metrics import samples
from scripts.common.serving import VLLM, comes_up, end, free_port, start


class Server:
    """A server of its own on a free port, its output in a file.

    Args:
        log: the file.
        model: a folder.
        options: of `vllm serve`.
        environment: variables, beside those that stand.
    """

    def __init__(self, log: Path, model: Path, *options: str, **environment: str) -> None:
        port = free_port()
        self.url, self.model, self.log = f"http://127.0.0.1:{port}", str(model), log
        command = [VLLM, "serve", self.model, f"--port={port}", "--host=127.0.0.1"]
        self.process = start([*command, "--attention-backend=dca", *options], log, environment)

    def wait(self) -> None:
        """Until it answers.

        Raises:
            RuntimeError: it ended, or takes too long; with its errors and its last words.
        """
        if not comes_up(self.process, self.url):
            said = self.log.read_text()
            errors = [line for line in said.splitlines() if "Error" in line]
            raise RuntimeError("\n".join(["no start:", *errors, said[-5000:]]))

    def children(self, name: str = "") -> list[psutil.Process]:
        """Its processes of this name."""
        found = self.process.children(recursive=True)
        return [each for each in found if name in " ".join(each.cmdline())]

    def complete(self, **body: Any) -> tuple[int, dict[str, Any]]:
        return self._ask("/v1/completions", **body)

    def chat(self, messages: list[dict[str, Any]], **body: Any) -> tuple[int, dict[str, Any]]:
        return self._ask("/v1/chat/completions", messages=messages, **body)

    def _ask(self, path: str, **body: Any) -> tuple[int, dict[str, Any]]:
        asked = {"model": self.model, "temperature": 0, **body}
        return self.post(path, json.dumps(asked).encode())

    def post(self, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
        """Whatever is to be sent; a status, and what was answered."""
        request = urllib.request.Request(
            f"{self.url}{path}", body, {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def metric(self, name: str, **labels: str) -> float:
        """The sum over all label sets that have these."""
        with urllib.request.urlopen(f"{self.url}/metrics") as response:
            found = samples(response.read().decode())
        return sum(
            each.value
            for each in found
            if each.name == name and labels.items() <= each.labels.items()
        )

    def stop(self) -> None:
        """End it and all that it started, whether it has ended or not."""
        end(self.process)
