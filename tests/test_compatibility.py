"""docs/compatibility.md: the versions and the names that it lists are the project's."""

import json
import re
import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from vllm_dca.engine.shims import TESTED_VLLM
from vllm_dca.method.config import OPTION_KEYS

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
COMPATIBILITY = (ROOT / "docs" / "compatibility.md").read_text()


def on_record() -> dict[str, str]:
    rows = re.findall(r"^\| ([\w-]+) \| ([^|]+?) \|", COMPATIBILITY, re.M)
    return dict(rows)


def only(requirements: list[str], name: str) -> SpecifierSet:
    (found,) = (r for r in map(Requirement, requirements) if r.name == name)
    return found.specifier


def test_versions_on_record_are_those_that_are_installed_for_the_tests() -> None:
    recorded = on_record()
    setup = (ROOT / "scripts" / "setup").read_text()
    alias = tomllib.loads((ROOT / "scripts" / "vllm_alias" / "pyproject.toml").read_text())
    extras = PROJECT["optional-dependencies"]
    kernels = json.loads((ROOT / "docs" / "results" / "kernels.json").read_text())
    assert alias["project"]["version"].removesuffix("+cpu") in recorded["vLLM"].split(", ")
    assert re.findall(r"^torch=(\S+)$", setup, re.M) == [recorded["torch"]]
    assert only(extras["test"], "ray") == SpecifierSet(f"=={recorded['Ray']}")
    assert {run["versions"]["triton"] for run in kernels["runs"].values()} == {
        recorded["Triton"]
    }


def test_versions_on_record_are_those_that_pip_takes() -> None:
    recorded = on_record()
    (vllm,) = metadata.packages_distributions()["vllm"]
    python = metadata.metadata(vllm)["Requires-Python"]
    releases = recorded["vLLM"].split(", ")
    assert [release.rpartition(".")[0] for release in releases] == list(TESTED_VLLM)
    taken = only(PROJECT["dependencies"], "vllm")
    assert [release for release in releases if release not in taken] == []
    description = (ROOT / PROJECT["readme"]).read_text()
    assert set(re.findall(r"\b0\.\d+\b", description)) == set(TESTED_VLLM)
    assert recorded["Ray"] in only(PROJECT["optional-dependencies"]["ray"], "ray")
    assert recorded["transformers"] in only(metadata.requires(vllm) or [], "transformers")
    assert recorded["Python"] in SpecifierSet(PROJECT["requires-python"])
    stated = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
    minors = [f"3.{minor}" for minor in range(50) if f"3.{minor}" in SpecifierSet(python)]
    assert stated == minors
    setup = (ROOT / "scripts/setup").read_text()
    assert f"takes Python {minors[0]} to {minors[-1]}" in setup


def test_what_did_not_run_is_not_on_record_as_tested() -> None:
    recorded = on_record()
    assert recorded["flash-attn"] == "not run"
    assert recorded["xformers"] == metadata.version("xformers")
    assert recorded["xformers"] in only(
        PROJECT["optional-dependencies"]["xformers"], "xformers"
    )


def test_public_names_are_all_listed() -> None:
    listed = set(re.findall(r"`([\w:]+)`", COMPATIBILITY))
    engine = ROOT / "vllm_dca" / "engine"
    source = "".join(
        (engine / name).read_text() for name in ("metrics.py", "sparse_metrics.py")
    )
    # prometheus_client appends what a counter's name must end with.
    metrics = {
        name + "_total" * (kind == "Counter")
        for kind, name in re.findall(r'(\w+)\(\s*"(vllm_dca:\w+)"', source)
    }
    assert {name for name in listed if name.startswith("vllm_dca:")} == metrics
    assert set(OPTION_KEYS) <= listed
