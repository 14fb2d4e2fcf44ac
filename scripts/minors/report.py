"""Whether the plugin fits the vLLM of this environment: what moved, and what is gone.

Usage: python -m scripts.minors.report

Prints what `vllm-dca doctor` finds, a shim a line, then each patch that no longer applies and
each name of vLLM that the plugin or its tests import and that is gone. Nothing is changed; the
exit code is 1 if anything is in the way.
"""

import ast
import contextlib
import importlib
import importlib.util
import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from scripts.common.record import ROOT

console = Console(highlight=False, soft_wrap=True)


def patches_that_do_not_apply(patches: Path, packages: Path) -> list[str]:
    """Their names and git's words; `packages` is the folder that holds vllm/."""
    found = []
    for patch in sorted(patches.glob("*.patch")):
        tried = subprocess.run(
            ["git", "apply", "--check", patch],
            cwd=packages,
            env={**os.environ, "GIT_CEILING_DIRECTORIES": str(packages.parent)},
            capture_output=True,
            text=True,
        )
        if tried.returncode:
            found.append(f"{patch.name}: {tried.stderr.strip()}")
    return found


def imports_that_are_gone(folders: list[Path]) -> list[str]:
    """Of vLLM, by the files in these folders; what only a GPU's build has is not asked for."""
    missing = []
    for file in sorted(path for folder in folders for path in folder.rglob("*.py")):
        for module, name in _imports(file):
            reason = _missing(module, name)
            if reason:
                missing.append(f"{file.relative_to(ROOT)}: {reason}")
    return missing


def _imports(file: Path) -> Iterator[tuple[str, str | None]]:
    tree = ast.parse(file.read_text())
    # What a test or a provider expects to be missing, it imports under `try`.
    guarded = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.Try)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in guarded:
            continue
        if isinstance(node, ast.ImportFrom) and _of_vllm(node.module):
            yield from ((str(node.module), alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names if _of_vllm(alias.name))


def _of_vllm(module: str | None) -> bool:
    return module is not None and module.split(".")[0] == "vllm"


def _missing(module: str, name: str | None) -> str | None:
    try:
        # Some of vLLM's modules print when they are imported.
        with contextlib.redirect_stdout(io.StringIO()):
            found = importlib.import_module(module)
            if name is not None and not hasattr(found, name):
                importlib.import_module(f"{module}.{name}")
    except ImportError as error:
        return str(error)
    return None


def main() -> None:
    doctor = subprocess.run([sys.executable, "-m", "vllm_dca", "doctor"])
    [vllm] = importlib.util.find_spec("vllm").submodule_search_locations
    broken = patches_that_do_not_apply(ROOT / "patches", Path(vllm).parent)
    gone = imports_that_are_gone([ROOT / "vllm_dca", ROOT / "tests"])
    for what, lines in (("patches that do not apply", broken), ("imports that are gone", gone)):
        console.print(f"{what}: {len(lines) or 'none'}")
        for line in lines:
            console.print(f"    {line}", markup=False)
    sys.exit(bool(doctor.returncode or broken or gone))


if __name__ == "__main__":
    main()
