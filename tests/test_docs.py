"""What the documents point at exists: pages, headings, files, modules to run."""

import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
NAMES = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "patches/README.md")
DOCUMENTS = [*(ROOT / name for name in NAMES if (ROOT / name).exists()), *PAGES]

FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
TARGET = re.compile(r"\]\(([^)\s]+)\)")
LINK = re.compile(r"!?\[([^\]]*)\]\([^)]*\)")
HEADING = re.compile(r"^#+ +(.+?) *$", re.MULTILINE)
MODULE = re.compile(r"python -m (scripts[\w.]*\w)")
# Not inside a longer path or address.
FILE = re.compile(r"(?<![\w./-])(?:scripts|tests|vllm_dca)/[\w./-]*")


def of(document: Path) -> str:
    return document.relative_to(ROOT).as_posix()


def links(text: str) -> list[str]:
    """Targets in this repository, of pictures too."""
    found = TARGET.findall(FENCE.sub("", text))
    return [target for target in found if not re.match(r"[a-z]+:", target)]


def anchors(document: Path) -> set[str]:
    """Those that GitHub gives a document's headings."""
    seen: Counter[str] = Counter()
    found = set()
    for heading in HEADING.findall(FENCE.sub("", document.read_text())):
        words = re.sub(r"[^\w\- ]", "", LINK.sub(r"\1", heading).lower()).replace(" ", "-")
        found.add(f"{words}-{seen[words]}" if seen[words] else words)
        seen[words] += 1
    return found


def broken_link(document: Path, target: str) -> bool:
    path, _, anchor = target.partition("#")
    file = (document.parent / path).resolve() if path else document
    if not file.is_relative_to(ROOT) or not file.exists():
        return True
    return bool(anchor) and anchor not in anchors(file)


def has_module(name: str) -> bool:
    path = ROOT / name.replace(".", "/")
    return path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()


@pytest.mark.parametrize("document", DOCUMENTS, ids=of)
def test_what_a_document_names_exists(document: Path) -> None:
    text = document.read_text()
    assert [target for target in links(text) if broken_link(document, target)] == []
    assert [name for name in MODULE.findall(text) if not has_module(name)] == []
    named = (path.rstrip(".-") for path in FILE.findall(text))
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_the_index_names_every_page() -> None:
    index = ROOT / "docs/README.md"
    named = {
        (index.parent / link.partition("#")[0]).resolve() for link in links(index.read_text())
    }
    assert named >= {*PAGES} - {index}


def test_what_is_broken_is_seen(tmp_path: Path) -> None:
    readme = ROOT / "README.md"
    assert links("[a](b.md), [![c](d.png)](e.md#f), [g](https://h)") == [
        "b.md",
        "d.png",
        "e.md#f",
    ]
    assert not broken_link(readme, "docs/gpu.md")
    assert broken_link(readme, "docs/no-such-page.md")
    assert broken_link(readme, "docs/gpu.md#no-such-heading")
    assert broken_link(readme, "../outside.md")
    page = tmp_path / "page.md"
    page.write_text(
        "# On a `GPU`\n\n```\n# no heading\n```\n\n## Why, then?\n\n## Why, then?\n"
    )
    assert anchors(page) == {"on-a-gpu", "why-then", "why-then-1"}
    assert has_module("scripts.bench.cpu")
    assert not has_module("scripts.bench_cpu")
    assert FILE.findall("x/scripts/a, `scripts/b.py`, tests/c.py::test_d") == [
        "scripts/b.py",
        "tests/c.py",
    ]
