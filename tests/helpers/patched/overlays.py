"""A vLLM with patches: a folder of links to the installed one.

Only the files that the patches change are copies, and the tests that they add are new.
"""

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

INSTALLED = Path(importlib.util.find_spec("vllm").origin).parents[1]
README = Path(__file__).parents[3] / "patches/README.md"
PATCHES = sorted(README.parent.glob("*.patch"))
# Patches in force: none, so that the shims do it all; each alone; all, without any shim.
SETUPS = {"shims": [], **{patch.name[:4]: [patch] for patch in PATCHES}, "patches": PATCHES}


def changed_by(patch: Path) -> list[Path]:
    """Files of vLLM."""
    return [Path(path) for path in re.findall(r"^--- a/(\S+)$", patch.read_text(), re.M)]


def added_by(patch: Path) -> list[Path]:
    """Tests for vLLM. A wheel of it has none, and no folder to put them in."""
    new = r"^--- /dev/null\n\+\+\+ b/(\S+)$"
    return [Path(path) for path in re.findall(new, patch.read_text(), re.M)]


def git(root: Path, *args: str | Path) -> str:
    return subprocess.run(
        ["git", "-c", "user.name=tests", "-c", "user.email=", *args],
        cwd=root,
        # Not to be taken for a part of a repository around it.
        env={**os.environ, "GIT_CEILING_DIRECTORIES": str(root.parent)},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout


def make_overlay(root: Path, patches: list[Path]) -> Path:
    """Make `root` hold a vllm package that differs from the installed one by the patches."""
    changed = {path for patch in patches for path in changed_by(patch)}
    folders = {folder for path in changed for folder in path.parents} - {Path()}
    for folder in sorted(folders):
        (root / folder).mkdir(parents=True)
        for entry in (INSTALLED / folder).iterdir():
            path = folder / entry.name
            if path in changed:
                shutil.copyfile(entry, root / path)
            # Its own, where patched files are cached for it alone; that of files as installed.
            elif entry.name == "__pycache__":
                shutil.copytree(entry, root / path)
            elif path not in folders:
                (root / path).symlink_to(entry)
    for patch in patches:
        git(root, "apply", "--check", patch)
        git(root, "apply", patch)
    return root


def copy_changed(root: Path) -> None:
    """What a checkout, or an installation, has of the files that the patches change."""
    for path in {path for patch in PATCHES for path in changed_by(patch)}:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(INSTALLED / path, root / path)
