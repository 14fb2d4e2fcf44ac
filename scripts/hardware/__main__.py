"""What only a GPU can show: kernels against the reference, graphs, launches, times.

A step that fails does not end the run: the next one starts, what was measured is on disk, and a
list of what failed comes last. Each step has a log beside its results.

torch, NumPy, Triton, pytest and hypothesis are enough; flash-attention and xformers are timed
where they are. --engine runs vLLM too: it wants vLLM for CUDA and this plugin installed.

--dry-run needs no GPU: every step's imports and arguments, small cases in Triton's interpreter,
nothing timed.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from scripts.common import record


class Step(NamedTuple):
    """A command that says by its status whether it did."""

    name: str
    command: list[str]


def python(module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", module, *arguments]


def steps(engine: bool, dry_run: bool, results: Path) -> list[Step]:
    small = ["--dry-run"] if dry_run else []

    def measuring(module: str) -> Step:
        name = module.rpartition(".")[2]
        output = results / f"gpu-{name}.json"
        return Step(name, python(module, *small, "--output", str(output)))

    found = [_tests(dry_run)]
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer and not dry_run:
        files = (f"tests/cuda/test_{name}.py" for name in ("kernels", "sparse"))
        checked = ["--error-exitcode", "1", *python("pytest", *files)]
        only = ["head_sizes", "replay", "pad_are_zero", "every_border", "fp8", "as_alone"]
        found.append(Step("sanitizer", [sanitizer, *checked, "-k", " or ".join(only)]))
    timed = ("kernels", "providers", "sparse_kernels")
    found += [measuring(f"scripts.bench.{name}") for name in timed]
    if engine:
        found += [
            measuring("scripts.hardware.parity"),
            measuring("scripts.hardware.engine"),
        ]
    return found


def _tests(dry_run: bool) -> Step:
    """Kernels against the fp64 reference; then graphs, synchronisation and launches."""
    if dry_run:
        only = ["-k", "pad_are_zero or waits"]
        return Step("tests", python("pytest", "tests/cuda/test_kernels.py", *only))
    names = ("kernels", "caps_and_sinks", "sparse", "gpu")
    return Step("tests", python("pytest", *(f"tests/cuda/test_{name}.py" for name in names)))


def run(step: Step, log: Path) -> int:
    """Show what a step prints, and keep it."""
    with log.open("w") as kept:
        process = subprocess.Popen(
            step.command,
            cwd=record.ROOT,
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
    journal = record.Journal(results / "gpu.json", facts)
    for step in found:
        print(f"\n== {step.name}: {record.command(*step.command)}", flush=True)
        log = results / f"gpu-{step.name}.log"
        with journal.attempt(step.name):
            status = run(step, log)
            journal.add({"step": step.name, "status": status, "log": log.name})
            if status:
                raise RuntimeError(f"ended with status {status}, see {log}")
    journal.end()
    print(f"\nAll steps did: {', '.join(step.name for step in found)}. Results: {results}")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="scripts/gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--engine", action="store_true", help="vLLM's engine too")
    parser.add_argument("--dry-run", action="store_true", help="small, and without a GPU")
    parser.add_argument("results", nargs="?", type=Path, default=record.ROOT / "docs/results")
    args = parser.parse_args()
    import torch

    if not args.dry_run and not torch.cuda.is_available():
        sys.exit("There is no GPU, or not one that torch finds; --dry-run needs none.")
    results = args.results.resolve()
    facts = record.provenance("triton")
    run_all(steps(args.engine, args.dry_run, results), results, facts)


if __name__ == "__main__":
    main()
