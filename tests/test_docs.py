"""What the documents point at exists: pages, headings, files, modules to run.

And a record knows the code that it measured, so that a document can say if it is older.
"""

import ast
import importlib.util
import json
import re
from collections import Counter
from pathlib import Path

import pytest

from scripts.common import sources
from scripts.common.sources import Measurement
from scripts.docs import records, tables

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


def messages_of(*modules: Path) -> list[str]:
    """Every string in the code, with … in place of what differs from case to case."""

    def text(node: ast.expr) -> str:
        if isinstance(node, ast.JoinedStr):
            return "".join(map(text, node.values))
        return str(node.value) if isinstance(node, ast.Constant) else "…"

    return [
        re.sub(r"%[sd.\d]*[sdf]", "…", text(node))
        for module in modules
        for node in ast.walk(ast.parse(module.read_text()))
        if isinstance(node, ast.JoinedStr)
        or (isinstance(node, ast.Constant) and isinstance(node.value, str))
    ]


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


def test_every_record_says_what_it_measures() -> None:
    named = [name for of in sources.MEASUREMENTS.values() for name in of.records]
    kept = {path.stem for path in records.RESULTS.glob("*.json")}
    assert sorted(named) == sorted({*named})
    assert kept <= {*named}
    for of in sources.MEASUREMENTS.values():
        assert all(list(ROOT.glob(pattern)) for pattern in (*of.files, *sources.SPARSE))
    # What README.md shows of a record, or draws, is among what is told to be older.
    readme = (ROOT / "README.md").read_text()
    assert {found[1] for found in tables.TABLE.finditer(readme)} <= {*tables.DATED}


@pytest.mark.parametrize(
    ("suffix", "code", "same", "other"),
    [
        (
            ".py",
            'def f(x):\n    return x + "#1"\n',
            '"""What."""\n\ndef f(x):  # why\n    """Wie groß?"""\n\n    return x + "#1"\n',
            'def f(x):\n    return x + "#2"\n',
        ),
        (
            ".h",
            'int f() {\n  return g("//1");\n}\n',
            '/* What,\n and why. */\nint f() {  // how\n\n  return g("//1");\n}\n',
            'int f() {\n  return g("//2");\n}\n',
        ),
        ("", "echo '# 1'\n", "# What.\n\necho '# 1'\n    # why\n", "echo '# 2'\n"),
    ],
)
def test_a_digest_is_of_the_code(
    suffix: str, code: str, same: str, other: str, tmp_path: Path
) -> None:
    def digest(text: str) -> str:
        path = tmp_path / f"file{suffix}"
        path.write_text(text)
        return sources.digest(path)

    assert digest(code) == digest(same) != digest(other)


def test_an_older_record_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = "scripts.bench.made_up"
    measured = Measurement(("made-up",), ("vllm_dca/*.py",))
    monkeypatch.setitem(sources.MEASUREMENTS, module, measured)
    own, kernel = tmp_path / "scripts/bench/made_up.py", tmp_path / "vllm_dca/kernel.py"
    record = tmp_path / "docs/results/made-up.json"
    for path in (own, kernel, record):
        path.parent.mkdir(parents=True)
        path.write_text("x = 1\n")

    # A record of two runs.
    run = {"commit": "abc", "sources": sources.digests(module, tmp_path)}
    record.write_text(json.dumps({"results": {"dca": {"run": run}, "plain": {"run": run}}}))
    kernel.write_text("x = 1  # the same\n")
    assert records.changed("made-up", tmp_path) == []
    kernel.write_text("x = 2\n")
    assert records.changed("made-up", tmp_path) == ["vllm_dca/kernel.py"]
    kernel.unlink()
    assert records.changed("made-up", tmp_path) == ["vllm_dca/kernel.py"]
    # A run of vLLM's own attention measured no kernel.
    record.write_text(json.dumps({"plain": {**run, "backend": "CPU_ATTN"}}))
    assert records.changed("made-up", tmp_path) == []
    own.write_text("x = 2\n")
    assert records.changed("made-up", tmp_path) == ["scripts/bench/made_up.py"]
    # Nobody knows what made this one.
    record.write_text(json.dumps({"commit": "abc-dirty"}))
    assert records.changed("made-up", tmp_path) == ["scripts/bench/made_up.py"]
    with pytest.raises(KeyError, match="unheard-of"):
        records.changed("unheard-of", tmp_path)


def test_what_the_readme_shows_says_that_it_is_older(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "<!-- table: demo -->\n<!-- end -->\n"
    for found, told in (([], False), (["vllm_dca/kernel.py"], True)):
        monkeypatch.setattr(records, "changed", lambda _, found=found: found)
        assert ("earlier version" in tables.rewritten(text)) == told
    # Where no table says what it is of.
    text = "<!-- table: evaluation -->\n<!-- end -->\n"
    assert "\n*The picture and these numbers were measured by an earlier" in tables.rewritten(
        text
    )


@pytest.mark.nightly
def test_what_the_readme_shows_is_of_this_code() -> None:
    """A change may wait for its measurement, which takes an hour; a release does not."""
    readme = (ROOT / "README.md").read_text()
    shown = {name for found in tables.TABLE.finditer(readme) for name in tables.DATED[found[1]]}
    assert shown
    assert {name: files for name in shown if (files := records.changed(name))} == {}


@pytest.mark.each_minor
def test_messages_that_are_explained_are_printed() -> None:
    """The quotes of docs/troubleshooting.md are in our code, or in vLLM's where it says so."""
    vllm = Path(importlib.util.find_spec("vllm").origin).parent
    ours = messages_of(*(ROOT / "vllm_dca").rglob("*.py"))
    theirs = messages_of(
        *(vllm / "v1/attention/backends" / name for name in ("registry.py", "utils.py")),
        *(vllm / "v1/core").glob("kv_cache_*.py"),
        vllm / "config/model.py",
    )
    page = (ROOT / "docs/troubleshooting.md").read_text()
    quoted = re.findall(r"^\| `([^`]*)`( \(vLLM\))?", page, re.MULTILINE)
    assert len(quoted) > 10
    pythons = "No module named 'vllm_dca'"
    plain = {"vllm_dca:request_tokens_past_window_total", pythons}
    for message, of_vllm in quoted:
        start = message.removesuffix("…").rstrip()
        places = theirs if of_vllm else ours
        assert message in plain or any(start in each for each in places), message
