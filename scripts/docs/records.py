"""Which records in docs/results/ were made by code that has changed since.

Usage: python -m scripts.docs.records

A record knows the digests of the files that it measured (scripts/common/sources.py). Older
records are no failure from day to day, since a measurement takes hours. But a page that shows
one must say so: `python -m scripts.docs.tables` writes that, and the tests see that it was
done. Where README.md shows one, `scripts/test -m nightly` fails.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from scripts.common import sources
from scripts.docs.page import RESULTS


def runs(record: Any) -> Iterator[dict[str, Any]]:
    """The parts of a record that say which commit made them."""
    if not isinstance(record, dict):
        return
    if "commit" in record or "sources" in record:
        yield record
    else:
        for part in record.values():
            yield from runs(part)


def changed(name: str, root: Path = sources.ROOT) -> list[str]:
    """Files that a record measured and that are others now; of an unknown state: all."""
    module = sources.module_of(name)
    if module is None:
        raise KeyError(f"scripts/common/sources.py does not say what {name} measures")
    now = sources.digests(module, root)
    found: set[str] = set()
    every = list(runs(json.loads((root / f"docs/results/{name}.json").read_text())))
    for run in every or [{}]:
        then = run.get("sources", {})
        differ = {path for path in {*now, *then} if now.get(path) != then.get(path)}
        # Where another attention ran, none of DCA's code was measured.
        theirs = "DCA" not in run.get("backend", "DCA")
        found |= {path for path in differ if not (theirs and path.startswith("vllm_dca/"))}
    return sorted(found)


def note(*names: str, said: str = "Measured") -> str:
    """To stand below a table: whether its records are of the code as it is."""
    if not any(changed(name) for name in names):
        return ""
    return f"\n*{said} by an earlier version of the code.*\n"


def main() -> None:
    table = Table("record", "commit", "changed since")
    for path in sorted(RESULTS.glob("*.json")):
        every = list(runs(json.loads(path.read_text())))
        commits = {run.get("commit", "unknown")[:7] for run in every}
        known = every and all("sources" in run for run in every)
        since = changed(path.stem)
        names = ", ".join(since[:4]) + (f" and {len(since) - 4} more" if since[4:] else "")
        table.add_row(
            path.stem,
            ", ".join(sorted(commits)) or "unknown",
            names if known else "unknown",
            style="" if since else "green",
        )
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
