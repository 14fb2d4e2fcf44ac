"""What tables are made from, and how they look."""

import json
from collections.abc import Iterable
from typing import Any

from scripts.common.record import ROOT

RESULTS = ROOT / "docs/results"
SPARSE_LENGTHS = ("16k", "32k", "128k")  # of the records sparse-quality-*


def load(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return found


def markdown(*rows: Iterable[object]) -> str:
    """The first row is the head."""
    head, *body = [[str(cell) for cell in row] for row in rows]
    lines = [head, ["---"] * len(head), *body]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)
