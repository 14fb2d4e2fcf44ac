"""A verdict on every text model of vLLM's registry: docs/results/models.json.

    python -m scripts.models.sweep [ARCHITECTURE ...] [--again]

Each model has a process of its own, and the record is written after each; what stands in it
is not run again, unless it is named or --again is given.
"""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from scripts.common.record import ROOT, provenance, write
from scripts.models import proof
from scripts.models.recipes import RECIPES, architectures
from scripts.models.verdicts import verdicts
from tests.helpers import vision

RECORD = ROOT / "docs/results/models.json"
SECONDS = 240


def run(recipe: dict[str, Any], keep: Path | None = None) -> dict[str, Any]:
    """What the proof found, or how it failed."""
    with tempfile.TemporaryDirectory() as directory:
        process = CONTEXT.Process(target=proof.main, args=(directory, recipe))
        process.start()
        process.join(SECONDS)
        if process.is_alive():
            process.kill()
            process.join()
            return {"failed": f"took more than {SECONDS} s"}
        found = Path(directory, "found.json")
        traceback = Path(directory, "traceback")
        if traceback.exists() and keep is not None:
            keep.write_text(traceback.read_text())
        if not found.exists():
            return {"failed": f"the process ended with {process.exitcode}"}
        return dict(json.loads(found.read_text()))


CONTEXT = multiprocessing.get_context("forkserver")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("architectures", nargs="*")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--output", type=Path, default=RECORD)
    parser.add_argument("--tracebacks", type=Path, help="a folder for those of what failed")
    asked = parser.parse_args()
    vision.for_children(os.environ, sys.path)
    os.environ.setdefault(
        "VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, sorted(os.sched_getaffinity(0))))
    )
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    # What takes longest is imported once.
    CONTEXT.set_forkserver_preload(["scripts.models.proof", "scripts.models.preload"])
    record = json.loads(asked.output.read_text()) if asked.output.exists() else {}
    found: dict[str, Any] = record.get("found", {})
    for name in asked.architectures or architectures():
        if name not in RECIPES or (name in found and not (asked.again or asked.architectures)):
            continue
        began = time.monotonic()
        keep = asked.tracebacks / name if asked.tracebacks else None
        found[name] = run(RECIPES[name], keep)
        seconds = time.monotonic() - began
        print(f"{name}: {json.dumps(found[name])[:300]} ({seconds:.0f} s)", flush=True)
        keep_record(asked.output, found)
    print(keep_record(asked.output, found))


def keep_record(output: Path, found: dict[str, Any]) -> Counter[str]:
    """Write it; how many models have which verdict."""
    judged = verdicts(found)
    ordered = {each: found[each] for each in architectures() if each in found}
    write(output, {**provenance("transformers"), "found": ordered, "verdicts": judged})
    return Counter(of["verdict"] for of in judged.values())


if __name__ == "__main__":
    main()
