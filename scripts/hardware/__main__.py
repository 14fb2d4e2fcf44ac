"""What only a GPU can show: kernels against the reference, graphs, launches, times.

A step that fails does not end the run: the next one starts, what was measured is on disk, and a
list of what failed comes last. gpu.log has what all steps print, gpu.json how each ended.

torch, NumPy, Triton, pytest and hypothesis are enough; flash-attention and xformers are timed
where they are. --engine runs vLLM too: it wants vLLM for CUDA and this plugin installed.

--only runs the steps that it names (the folder for results goes before it). What is in the
folder of other steps stays.

--dry-run needs no GPU: every step's imports and arguments, small cases in Triton's interpreter,
nothing timed.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from scripts.common import record

# Kernels against the fp64 reference. What no machine without a GPU has met goes first: graphs,
# synchronisation and launches.
TESTS = (
    "test_gpu",
    "test_decode",
    "test_prefill",
    "test_caps_and_sinks",
    "test_sparse_prefill",
)
TEST_FILES = {name: f"tests/cuda/{name}.py" for name in TESTS}
MEASURING = {
    "kernels": "scripts.bench.kernels",
    "providers": "scripts.bench.providers",
    "sparse_kernels": "scripts.bench.sparse_kernels",
}
WITH_VLLM = {"parity": "scripts.hardware.parity", "engine": "scripts.hardware.engine"}
NAMES = (*TESTS, "sanitizer", *MEASURING, *WITH_VLLM)
# Random cases a property: nearly each compiles kernels of its own. The interpreter tries more.
CASES = "4"
# Of the tests, those whose kernels are few.
SANITIZED = ("head_sizes", "replay", "pad_are_zero", "every_border", "fp8", "as_alone")


class Step(NamedTuple):
    """A command that says by its status whether it did."""

    name: str
    command: list[str]
    environment: Mapping[str, str] = MappingProxyType({})

    def __str__(self) -> str:
        """As one would type it."""
        settings = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*settings, record.command(*self.command)])


def chosen(only: Sequence[str], engine: bool, dry_run: bool) -> list[str]:
    """Names of the steps to run, in their order.

    Raises:
        ValueError: one was asked for that this machine cannot run.
    """
    cannot = {}
    if dry_run:
        cannot = dict.fromkeys((*TESTS, "sanitizer"), "it needs a GPU")
        del cannot["test_decode"], cannot["test_prefill"]
    elif not shutil.which("compute-sanitizer"):
        cannot = {"sanitizer": "compute-sanitizer is not on the path"}
    for name in only:
        if name in cannot:
            raise ValueError(f"--only {name}: {cannot[name]}")
    wanted = only or [name for name in NAMES if engine or name not in WITH_VLLM]
    return [name for name in NAMES if name in wanted and name not in cannot]


def step(name: str, dry_run: bool, results: Path) -> Step:
    if name in TESTS:
        command = python("pytest", TEST_FILES[name])
        if dry_run:
            return Step(name, [*command, "-k", "pad_are_zero or waits"])
        return Step(name, command, {"DCA_CASES": os.environ.get("DCA_CASES", CASES)})
    if name == "sanitizer":
        files = (
            TEST_FILES[test] for test in ("test_decode", "test_prefill", "test_sparse_prefill")
        )
        tests = python("pytest", *files, "-k", " or ".join(SANITIZED))
        # What torch's allocator hands out lies in large segments, in which nothing is out of
        # bounds.
        each_by_itself = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        return Step(
            name, ["compute-sanitizer", "--error-exitcode", "1", *tests], each_by_itself
        )
    small = ["--dry-run"] * dry_run
    output = str(results / f"gpu-{name}.json")
    return Step(name, python({**MEASURING, **WITH_VLLM}[name], *small, "--output", output))


def python(module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", module, *arguments]


def run(step: Step, log: Path) -> int:
    """Show what a step prints, and keep it."""
    with log.open("a") as kept:
        kept.write(f"== {step.name}: {step}\n")
        kept.flush()
        process = subprocess.Popen(
            step.command,
            cwd=record.ROOT,
            env={**os.environ, **step.environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            kept.write(line)
            kept.flush()
        return process.wait()


def run_all(found: list[Step], results: Path, facts: dict[str, Any]) -> None:
    """One after the other, whatever the others do; exits with a list of those that failed."""
    results.mkdir(parents=True, exist_ok=True)
    output, log = results / "gpu.json", results / "gpu.log"
    names = [step.name for step in found]
    before = json.loads(output.read_text())["results"] if output.exists() else []
    journal = record.Journal(output, facts)
    journal.results = [row for row in before if row["step"] not in names]
    for step in found:
        print(f"\n== {step.name}: {step}", flush=True)
        with journal.attempt(step.name):
            start = time.monotonic()
            status = run(step, log)
            seconds = round(time.monotonic() - start)
            ended = {"step": step.name, "status": status, "seconds": seconds}
            journal.add({**ended, "commit": facts.get("commit")})
            if status:
                raise RuntimeError(f"ended with status {status}, see {log}")
    journal.end()
    print(f"\nAll steps did: {', '.join(names)}. Results: {results}")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="scripts/gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--engine", action="store_true", help="vLLM's engine too")
    parser.add_argument(
        "--only", nargs="+", choices=NAMES, default=[], metavar="STEP", help=", ".join(NAMES)
    )
    parser.add_argument("--dry-run", action="store_true", help="small, and without a GPU")
    parser.add_argument("results", nargs="?", type=Path, default=record.ROOT / "docs/results")
    args = parser.parse_args()
    try:
        names = chosen(args.only, args.engine, args.dry_run)
    except ValueError as error:
        parser.error(str(error))
    import torch

    if not args.dry_run and not torch.cuda.is_available():
        sys.exit("There is no GPU, or not one that torch finds; --dry-run needs none.")
    results = args.results.resolve()
    facts = record.provenance("triton")
    run_all([step(name, args.dry_run, results) for name in names], results, facts)


if __name__ == "__main__":
    main()
