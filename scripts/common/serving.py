"""A server of its own for a script, and what is shown while one waits."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psutil
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from scripts.common.record import ROOT

VLLM = str(Path(sys.executable).with_name("vllm"))
CACHE = ROOT / ".cache"
# More than any machine should take.
STARTING_S = 1800
ENDING_S = 120

console = Console()


@contextlib.contextmanager
def working(what: str) -> Iterator[Progress]:
    """Show a spinner and the time so far; at the end the line stays."""
    columns = SpinnerColumn(finished_text="✓"), TextColumn("{task.description}")
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        task = progress.add_task(what, total=1)
        yield progress
        progress.update(task, completed=1)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def is_up(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2):
            return True
    except OSError:
        return False


def start(
    command: Sequence[str | Path], log: Path, environment: Mapping[str, str] | None = None
) -> psutil.Popen:
    """Begin a process in a session of its own, what it says in a file."""
    log.parent.mkdir(exist_ok=True)
    with log.open("w") as output:
        return psutil.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, **(environment or {})},
        )


def comes_up(process: psutil.Popen, url: str) -> bool:
    """Wait until it answers; False if it ended first, or takes too long."""
    deadline = time.monotonic() + STARTING_S
    while not is_up(url):
        if process.poll() is not None or time.monotonic() > deadline:
            return False
        time.sleep(0.5)
    return True


def end(process: psutil.Popen) -> None:
    """End it and all that it started, whether it has ended or not."""
    with contextlib.suppress(psutil.NoSuchProcess):  # it has ended
        children = process.children(recursive=True)
        process.terminate()
        _, alive = psutil.wait_procs([process, *children], ENDING_S)
        for each in alive:
            each.kill()
    with contextlib.suppress(ProcessLookupError):  # so have its children
        os.killpg(process.pid, signal.SIGKILL)


@contextlib.contextmanager
def server(command: Sequence[str | Path], url: str, log: Path) -> Iterator[psutil.Process]:
    """Start the server that will be at `url`, wait until it is, and stop it at the end."""
    if is_up(url):
        sys.exit(f"Another server runs at {url}: stop it, or choose another --port.")
    process = start(command, log)
    try:
        with working(f"starting a server (log: {log.relative_to(ROOT)})"):
            if not comes_up(process, url):
                sys.exit(f"The server did not start: see {log}")
        yield process
    finally:
        end(process)
