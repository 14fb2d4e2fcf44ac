"""What a result must say of itself to be made again: command, commit, machine, versions."""

import json
import platform
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def provenance(*packages: str) -> dict[str, Any]:
    """The facts of this run, to stand before its results; versions of the packages too."""
    cpus = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = [line.split(":")[1].strip() for line in cpus if line.startswith("model name")]

    def git(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", *words], cwd=ROOT, text=True, capture_output=True)

    commit = git("rev-parse", "HEAD").stdout.strip()
    # Results that another command has just written are no other code.
    if git("diff", "--quiet", "HEAD", "--", ".", ":!docs").returncode:
        commit += "-dirty"
    module = Path(sys.argv[0]).resolve().relative_to(ROOT).with_suffix("").as_posix()
    return {
        "command": command("python", "-m", module.replace("/", "."), *sys.argv[1:]),
        "commit": commit,
        "machine": f"{platform.machine()}, {len(cpu)} x {cpu[0] if cpu else 'unknown'}",
        "versions": {name: version(name) for name in ("torch", *packages)},
    }


def command(*words: str) -> str:
    """As one would type it in the project's folder."""
    return shlex.join([word.replace(f"{ROOT}/", "") for word in words])


def write(output: Path, record: dict[str, Any]) -> None:
    """As JSON, whole or not at all."""
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = output.with_suffix(".part")
    unfinished.write_text(json.dumps(record, indent=1) + "\n")
    unfinished.replace(output)
