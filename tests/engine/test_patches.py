"""The patches for vLLM: they apply, and their own tests pass with them and fail without."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.helpers.patched.observe import CPU_PATH, TOO_LONG
from tests.helpers.patched.overlays import (
    INSTALLED,
    PATCHES,
    README,
    SETUPS,
    added_by,
    changed_by,
    copy_changed,
    git,
)

TIMEOUT = 600  # seconds
each_minor = pytest.mark.each_minor

# Why the patches' own tests fail in a vLLM without them. Those that are not named here say what
# stays as it was.
WITHOUT_PATCH = {
    "test_registered_backend_pickling": {
        "test_unpickled_before_the_plugin_is_loaded[BY_PATH]": (
            "'test_registered_backend_pickling.OutOfTreeBackend' is not a valid "
            "AttentionBackendEnum"
        ),
        "test_unpickled_before_the_plugin_is_loaded[BY_DECORATOR]": (
            "Backend TORCH_SDPA must be registered before use"
        ),
    },
    "test_cpu_registered_backends": {
        "test_registered_backend_is_selected": f"'{CPU_PATH}' ==",
        "test_registered_backend_is_validated": "DID NOT RAISE",
    },
    "test_backend_extends_context": dict.fromkeys(
        [f"test_backend_that_extends_the_context[selected{i}]" for i in range(3)], TOO_LONG
    ),
    "test_backend_verifies_config": {
        **dict.fromkeys(
            [f"test_selected_backend_updates_the_config_once[selected{i}]" for i in range(4)],
            "assert {} == {'calls': 1}",
        ),
        "test_selected_backend_refuses_the_config": "DID NOT RAISE",
    },
    "test_backend_prepares_model": {
        f"test_selected_backend_prepares_the_model_once[{selected}]": "assert [] == [("
        for selected in (
            "backend0-backend_per_kind0-1",
            "None-backend_per_kind1-1",
            "backend2-backend_per_kind2-1",
        )
    },
}
OF_EACH_PATCH = pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.name[:4])


@each_minor
@pytest.mark.parametrize("setup", [setup for setup in SETUPS if setup != "shims"])
def test_patches_apply_to_the_installed_vllm(
    setup: str, overlays: Callable[[str], Path]
) -> None:
    root = overlays(setup)
    for patch in SETUPS[setup]:
        assert changed_by(patch)
        assert len(added_by(patch)) == 1
        for path in changed_by(patch):
            assert (root / path).read_text() != (INSTALLED / path).read_text()
        for path in changed_by(patch) + added_by(patch):
            compile((root / path).read_text(), path, "exec")


@each_minor
def test_git_takes_the_patches_as_mails(tmp_path: Path) -> None:
    copy_changed(tmp_path)
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "--message", "vLLM")
    base = git(tmp_path, "rev-parse", "HEAD").strip()
    results = set()
    for order in (PATCHES, PATCHES[::-1]):
        git(tmp_path, "checkout", "--quiet", "--detach", base)
        git(tmp_path, "am", "--quiet", "--keep-non-patch", *order)
        results.add(git(tmp_path, "rev-parse", "HEAD^{tree}"))
    assert len(results) == 1
    subjects = git(tmp_path, "log", "--format=%s", f"{base}..").splitlines()
    assert len(subjects) == len(PATCHES)
    assert all(re.fullmatch(r"\[(Attention|CPU)\] [A-Z].*[a-z]", line) for line in subjects)


@each_minor
def test_patches_apply_to_an_installation_as_the_page_says(tmp_path: Path) -> None:
    """In an environment inside a repository, as .venv is here."""
    root = tmp_path / "environment"
    copy_changed(root)
    (root / "vllm/__init__.py").touch()
    git(tmp_path, "init", "--quiet")
    [commands] = re.findall(r"^```sh\n(.*?)^```$", README.read_text(), re.M | re.S)
    subprocess.run(
        ["bash", "-ec", commands.replace("/path/to/vllm-dca", str(README.parents[1]))],
        env={
            **os.environ,
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "PYTHONPATH": str(root),
        },
        check=True,
    )
    for patch in PATCHES:
        for path in changed_by(patch):
            assert (root / path).read_text() != (INSTALLED / path).read_text()
    assert [entry.name for entry in root.iterdir()] == ["vllm"]


def _run_upstream_tests(root: Path) -> dict[str, dict[str, str]]:
    """By file, why each test in `root` fails; "" where it does not."""
    report = root / "report.xml"
    inherited = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-vv", "-p", "no:cacheprovider"),
            *(f"--rootdir={root}", f"--junit-xml={report}", "tests"),
        ],
        cwd=root,
        env={
            **os.environ,
            # Another minor of vLLM may be there; this project must not.
            "PYTHONPATH": os.pathsep.join([str(root), *map(os.path.abspath, inherited)]),
            "VLLM_PLUGINS": "",
        },
        stdout=subprocess.DEVNULL,
        timeout=TIMEOUT,
    )
    found: dict[str, dict[str, str]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        file = case.attrib["classname"].rpartition(".")[2]
        why = " ".join(f"{each.attrib['message']} {each.text}" for each in case)
        found.setdefault(file, {})[case.attrib["name"]] = why
    return found


@pytest.fixture(scope="module")
def patched_tests(overlays: Callable[[str], Path]) -> dict[str, dict[str, str]]:
    """What `_run_upstream_tests` returns with all patches."""
    return _run_upstream_tests(overlays("patches"))


@pytest.fixture(scope="module")
def unpatched_tests(
    overlays: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, str]]:
    """The same of the vLLM that is there."""
    root = tmp_path_factory.mktemp("unpatched")
    shutil.copytree(overlays("patches") / "tests", root / "tests")
    return _run_upstream_tests(root)


@each_minor
@OF_EACH_PATCH
def test_a_patch_s_own_tests_pass_with_it(
    patch: Path, patched_tests: dict[str, dict[str, str]]
) -> None:
    assert "vllm_dca" not in patch.read_text()
    [file] = added_by(patch)
    assert file.stem in WITHOUT_PATCH
    found = patched_tests[file.stem]
    assert found == dict.fromkeys(found, "")


@OF_EACH_PATCH
def test_a_patch_s_own_tests_fail_without_it(
    patch: Path,
    patched_tests: dict[str, dict[str, str]],
    unpatched_tests: dict[str, dict[str, str]],
) -> None:
    [file] = added_by(patch)
    found = unpatched_tests[file.stem]
    assert found.keys() == patched_tests[file.stem].keys()
    failed = {name for name, why in found.items() if why}
    assert failed == WITHOUT_PATCH[file.stem].keys()
    for name, reason in WITHOUT_PATCH[file.stem].items():
        assert reason in found[name]
