"""`vllm serve`, as users start it."""

import json
import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from scripts.common.serving import VLLM, free_port

STARTED = 300  # seconds


class Server:
    """`vllm serve` on a free port, its output in a file."""

    def __init__(self, log: Path, model: Path, *options: str, **environment: str) -> None:
        port = str(free_port())
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        self.model = str(model)
        command = [VLLM, "serve", self.model, "--port", port, "--host", "127.0.0.1"]
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [*command, "--attention-backend", "dca", *options],
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, **environment},
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
        return self._post("/v1/completions", **body)

    def chat(self, messages: list[dict[str, Any]], **body: Any) -> tuple[int, dict[str, Any]]:
        return self._post("/v1/chat/completions", messages=messages, **body)

    def _post(self, path: str, **body: Any) -> tuple[int, dict[str, Any]]:
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

    def metric(self, name: str, labels: str = "") -> float:
        """The sum over all label sets that have this text in them."""
        with urllib.request.urlopen(f"{self.url}/metrics") as response:
            lines = response.read().decode().splitlines()
        chosen = [line for line in lines if line.startswith(name + "{") and labels in line]
        return sum(float(line.split()[-1]) for line in chosen)

    def stop(self) -> None:
        os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
