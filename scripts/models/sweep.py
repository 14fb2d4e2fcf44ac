"""A verdict on every text model of vLLM's registry: docs/results/models.json.

    python -m scripts.models.sweep [ARCHITECTURE ...] [--again] [--part 1/2]

Each model has a process of its own, and the record is written after each. A model that is in
the record is not run again, unless it is named. With --again it is, if its result is of other
code: so a sweep that was broken off goes on where it was. Parts may run at the same time.
"""

import argparse
import functools
import hashlib
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from scripts.common import sources
from scripts.common.record import ROOT, alone, provenance, write
from scripts.models import proof
from scripts.models.recipes import RECIPES, architectures
from scripts.models.verdicts import verdicts
from tests.helpers import vision

RECORD = ROOT / "docs/results/models.json"
SECONDS = 600


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
    parser.add_argument("--part", default="1/1", help="which one of how many")
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
    part, parts = map(int, asked.part.split("/"))
    for name in (asked.architectures or architectures())[part - 1 :: parts]:
        if name not in RECIPES:
            continue
        before, code = found_in(asked.output).get(name), code_of(name)
        stands = before is not None and (not asked.again or before.get("code") == code)
        if stands and (asked.again or not asked.architectures):
            continue
        began = time.monotonic()
        keep = asked.tracebacks / name if asked.tracebacks else None
        found = {**run(RECIPES[name], keep), "code": code}
        seconds = time.monotonic() - began
        print(f"{name}: {json.dumps(found)[:300]} ({seconds:.0f} s)", flush=True)
        keep_record(asked.output, {name: found})
    print(keep_record(asked.output, {}))


def code_of(name: str) -> str:
    """A digest of all that a model's proof hangs on: nothing else has it run again."""
    digests = _digests()
    folder = "scripts/models/"
    # The list of proved models follows from the record.
    apart = (folder, "vllm_dca/engine/support")
    if RECIPES[name]["refused"]:
        apart = (*apart, "vllm_dca/cpu/")  # It ends before anything is computed.
    code = {path: of for path, of in digests.items() if not path.startswith(apart)}
    code["proof"] = digests[f"{folder}proof.py"]
    if RECIPES[name]["architecture"]:
        code["renamed"] = digests[f"{folder}renamed.py"]
    told = json.dumps([code, RECIPES[name]], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()[:12]


@functools.cache
def _digests() -> dict[str, str]:
    return sources.digests("scripts.models.sweep")


def found_in(output: Path) -> dict[str, dict[str, Any]]:
    """What a record has of each model; nothing if it is not there."""
    return dict(json.loads(output.read_text())["found"]) if output.exists() else {}


def keep_record(output: Path, found: dict[str, dict[str, Any]]) -> Counter[str]:
    """Write what was found into the record; how many models have which verdict."""
    with alone(output):  # Another part may be writing.
        found = {**found_in(output), **found}
        judged = verdicts(found)
        ordered = {each: found[each] for each in architectures() if each in found}
        facts = provenance("transformers")
        if any(of.get("code") != code_of(each) for each, of in ordered.items()):
            facts.pop("sources", None)  # Not all of it is of this code.
        write(output, {**facts, "found": ordered, "verdicts": judged})
    return Counter(of["verdict"] for of in judged.values())


if __name__ == "__main__":
    main()
