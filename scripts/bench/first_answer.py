"""Time from `git clone` to the first answer, by phase: scripts/serve in a fresh clone.

Clone, environment, caches and temporary files are in a folder of their own, which is removed
at the end; pip's index and Python are this machine's. Committed code alone is cloned. A phase
lasts until the next one's first line in what scripts/serve prints.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from scripts.common import record
from scripts.common.serving import STARTING_S, free_port, is_up

# The phases in their order, by how the first line of each begins; the first two have none.
CLONE, ENVIRONMENT, ANSWER = "clone", "virtual environment", "answer of 30 tokens"
BEGINNINGS = {
    "torch": "Installing torch",
    "vLLM and what it needs": "Installing vLLM",
    "plugin, demo model and text": "Installing the plugin",
    "demo model unpacked": "Unpacking the demo model",
    "vLLM's server process": "Starting vLLM",
    "vLLM's engine process": r".*Initializing a V1 LLM engine",
    "model built, kernel compiled": r".*Starting to load model",
    "weights loaded": r".*DCA attends",
    "KV cache, warm-up": r".*Loading weights took",
    "ready to serve": r".*init engine",
}
# What would bring in something of this environment's.
LEFT_OUT = (
    *("VENV", "VIRTUAL_ENV", "PYTHONPATH", "PYTHONDONTWRITEBYTECODE"),
    *("TORCHINDUCTOR_CACHE_DIR", "VLLM_CACHE_ROOT", "UV_CACHE_DIR", "PIP_CACHE_DIR"),
)
PROMPT = {"model": "smollm2", "max_tokens": 30, "prompt": "Rotary positions are"}
LOOKING_S = 0.1


def received() -> int:
    """Bytes that came to this machine over the network until now."""
    lines = Path("/proc/net/dev").read_text().splitlines()[2:]
    counts = (line.split(":") for line in lines)
    return sum(int(of.split()[0]) for name, of in counts if name.strip() != "lo")


class Phases:
    """When each began, and how much had been received by then."""

    def __init__(self, first: str) -> None:
        self.began: dict[str, tuple[float, int]] = {}
        self.begin(first)

    def begin(self, name: str) -> None:
        self.began.setdefault(name, (time.monotonic(), received()))

    def begin_those_of(self, text: str) -> None:
        """Of lines that are new."""
        for name, line in BEGINNINGS.items():
            if re.search(f"^{line}", text, re.MULTILINE):
                self.begin(name)

    def found(self) -> dict[str, dict[str, float]]:
        """Seconds and megabytes of each, up to now."""
        marks = [*self.began.values(), (time.monotonic(), received())]
        return {
            name: {
                "seconds": round(after[0] - before[0], 1),
                "megabytes": round((after[1] - before[1]) / 1e6, 1),
            }
            for name, before, after in zip(self.began, marks, marks[1:], strict=False)
        }


def ask(url: str) -> str:
    """The answer to README.md's first prompt."""
    head = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(PROMPT).encode(), head)
    with urllib.request.urlopen(request, timeout=STARTING_S) as answer:
        text: str = json.load(answer)["choices"][0]["text"]
        return text


def measure(folder: Path, log: Path) -> tuple[dict[str, dict[str, float]], str, float]:
    """The phases, the answer, and the seconds of the same answer once more.

    Raises:
        RuntimeError: no answer came, or a phase was not seen; names the log.
    """
    environment = {key: value for key, value in os.environ.items() if key not in LEFT_OUT}
    for variable in ("TMPDIR", "XDG_CACHE_HOME"):
        environment[variable] = str(folder / variable.lower())
        Path(environment[variable]).mkdir()
    port = free_port()
    url = f"http://localhost:{port}"
    clone = folder / "clone"
    phases = Phases(CLONE)
    subprocess.run(["git", "clone", "--quiet", record.ROOT, clone], check=True)
    phases.begin(ENVIRONMENT)
    with log.open("wb") as output:
        server = subprocess.Popen(
            [clone / "scripts/serve", "--port", str(port)],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        last = time.monotonic() + STARTING_S
        while not is_up(url):
            if server.poll() is not None or time.monotonic() > last:
                raise RuntimeError(f"the server did not start: see {log}")
            phases.begin_those_of(log.read_text(errors="replace"))
            time.sleep(LOOKING_S)
        phases.begin(ANSWER)
        answer = ask(url)
        found = phases.found()
        start = time.monotonic()
        ask(url)
        again = time.monotonic() - start
    finally:
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.killpg(server.pid, signal.SIGTERM)
        server.wait()
    if unseen := {*BEGINNINGS} - {*found}:
        raise RuntimeError(f"not seen in {log}: {', '.join(sorted(unseen))}")
    return found, answer, round(again, 2)


def main(
    folder: Annotated[Path, typer.Option(help="With 5 GB of room.")] = Path("/tmp"),
    output: Annotated[Path | None, typer.Option(help="A record as JSON.")] = None,
) -> None:
    facts: dict[str, Any] = record.provenance("vllm", "vllm-dca")
    facts["cores"] = len(os.sched_getaffinity(0))
    log = folder / "first-answer.log"
    with tempfile.TemporaryDirectory(prefix="first-answer-", dir=folder) as made:
        found, answer, again = measure(Path(made), log)
    console = Console()
    for name, of in found.items():
        console.print(f"{of['seconds']:7.1f} s  {of['megabytes']:7.1f} MB  {name}")
    total = round(sum(of["seconds"] for of in found.values()), 1)
    console.print(f"{total:7.1f} s; the same answer again: {again} s: {answer!r}")
    if output:
        results = {"seconds": total, "phases": found, "again_seconds": again, "answer": answer}
        record.write(output, {**facts, **results})


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, rich_markup_mode="markdown")
    app.command(help=__doc__)(main)
    app()
