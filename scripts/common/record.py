"""What a result must say of itself to be made again: command, commit, machine, versions."""

import contextlib
import fcntl
import json
import os
import platform
import shlex
import subprocess
import sys
import traceback
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from scripts.common import sources
from scripts.common.sources import ROOT


def provenance(*packages: str) -> dict[str, Any]:
    """The facts of this run, to stand before its results; versions of the packages too.

    With digests of what it measured, if scripts/common/sources.py names the command.
    """
    cpus = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = [line.split(":")[1].strip() for line in cpus if line.startswith("model name")]

    path = Path(sys.argv[0]).resolve().relative_to(ROOT).with_suffix("").as_posix()
    module = path.removesuffix("/__main__").replace("/", ".")
    measured = sources.digests(module)
    return {
        "command": command("python", "-m", module, *sys.argv[1:]),
        "commit": commit(),
        "machine": f"{platform.machine()}, {len(cpu)} x {cpu[0] if cpu else 'unknown'}",
        "versions": {name: _version(name) for name in ("torch", *packages)},
        **({"sources": measured} if measured else {}),
    }


def commit() -> str:
    """Of this checkout; a copy without git has results too."""

    def git(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", *words], cwd=ROOT, text=True, capture_output=True)

    try:
        head = git("rev-parse", "HEAD")
    except FileNotFoundError:
        return "unknown: there is no git"
    if head.returncode:
        return "unknown: this is no checkout"
    # Results that another command has just written are no other code.
    changed = git("diff", "--quiet", "HEAD", "--", ".", ":!docs").returncode
    return head.stdout.strip() + ("-dirty" if changed else "")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def command(*words: str) -> str:
    """As one would type it in the project's folder."""
    return shlex.join([word.replace(f"{ROOT}/", "") for word in words])


def write(output: Path, record: dict[str, Any]) -> None:
    """As JSON, whole or not at all."""
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = output.with_suffix(".part")
    unfinished.write_text(json.dumps(record, indent=1) + "\n")
    unfinished.replace(output)


def resumed(output: Path | None, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """The results of a record of these very facts that was cut short, if there is one."""
    if output is None or not output.exists():
        return []
    before = json.loads(output.read_text())
    found: list[dict[str, Any]] = before.pop("results", [])
    return found if before == facts else []


def write_kernels(output: Path, rows: list[dict[str, Any]], facts: dict[str, Any]) -> None:
    """Kernels that were compiled, one a line: there are hundreds."""
    head = json.dumps(facts, indent=1).removesuffix("\n}")
    kernels = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    output.write_text(f'{head},\n "kernels": [\n{kernels}\n ]\n}}\n')


class Journal:
    """A record that is on disk after each result; what fails is told at the end."""

    def __init__(self, output: Path | None, facts: dict[str, Any]) -> None:
        self.output, self.facts = output, facts
        self.results: list[dict[str, Any]] = []
        self.failures: dict[str, str] = {}
        self._write()

    def add(self, result: dict[str, Any]) -> None:
        self.results.append(result)
        self._write()

    @contextlib.contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """An error in here is kept, and the next attempt goes on."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.failures[what] = f"{type(error).__name__}: {error}"
            self._write()

    def end(self) -> None:
        """Exit with the failures, if there were any."""
        if self.failures:
            lines = (f"{what}: {why}" for what, why in self.failures.items())
            sys.exit("\n".join(["FAILED:", *lines]))

    def _write(self) -> None:
        if self.output:
            found = {"failures": self.failures, "results": self.results}
            write(self.output, {**self.facts, **found})


@contextlib.contextmanager
def alone(output: Path) -> Iterator[None]:
    """Other commands that write this record wait meanwhile."""
    output.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(output.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


class Growing:
    """A record of results by one name or two, on disk after each, by several commands at once.

    Raises:
        ValueError: the file is of another run.
    """

    def __init__(self, output: Path | None, asked: dict[str, Any]) -> None:
        self.output, self.asked = output, json.loads(json.dumps(asked))
        self.results: dict[str, dict[str, Any]] = {}
        self._read()

    def add(self, row: str, column: str | None, result: dict[str, Any]) -> None:
        with alone(self.output) if self.output else contextlib.nullcontext():
            self._read()
            if column is None:
                self.results[row] = result
            else:
                self.results.setdefault(row, {})[column] = result
            if self.output:
                write(self.output, {**self.asked, "results": self.results})

    def _read(self) -> None:
        if not self.output or not self.output.exists():
            return
        found = json.loads(self.output.read_text())
        self.results = found.pop("results")
        if found != self.asked:
            raise ValueError(f"{self.output} is of another run: name another file")
