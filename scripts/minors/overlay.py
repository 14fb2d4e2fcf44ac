"""Another vLLM beside the installed one: its Python, on the installed one's CPU libraries.

Usage: python -m scripts.minors.overlay WHICH (a minor such as 0.33, a wheel, or a checkout)

Prints a folder to put first on PYTHONPATH. No index has a CPU build of every vLLM, so the other
one's Python runs on compiled operators that are a minor older or newer; what needs an operator
that changed in between cannot be shown this way.
"""

import argparse
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from scripts.common.bytecode import compile_modules
from scripts.common.record import ROOT

# Where what was made is kept.
OVERLAYS = ROOT / ".cache/minors"
# What a later vLLM imports and the installed one does not need.
LATER = ("orjson",)


def make(which: str) -> Path:
    """The folder for a minor, a wheel's file or a checkout; made if it is not there."""
    source = Path(which)
    if not source.exists():
        return _of_minor(which)
    if source.is_dir():
        if not (source / "vllm/__init__.py").exists():
            sys.exit(f"{which} has no vllm/__init__.py: name the checkout's own folder")
        return _finish(OVERLAYS / "checkout", source)
    return _of_wheel(source)


def _of_minor(minor: str) -> Path:
    if not minor.replace(".", "").isdigit():
        sys.exit(f"{minor} is no minor of vLLM, no wheel and no checkout")
    found = sorted(OVERLAYS.glob(f"vllm-{minor}.*"))
    if found:
        return found[-1]
    with tempfile.TemporaryDirectory() as folder:
        print(f"Downloading vLLM {minor} (350 MB)", file=sys.stderr)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        # Any platform's wheel will do: only its Python is used.
        pip += ["--only-binary", ":all:", "--dest", folder, f"vllm=={minor}.*"]
        subprocess.run(pip, check=True, stdout=sys.stderr)
        [wheel] = Path(folder).glob("*.whl")
        return _of_wheel(wheel)


def _of_wheel(wheel: Path) -> Path:
    target = OVERLAYS / "-".join(wheel.name.split("-")[:2])
    if target.exists():
        return target
    OVERLAYS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=OVERLAYS) as folder:
        with zipfile.ZipFile(wheel) as archive:
            members = [name for name in archive.namelist() if _is_python(name)]
            archive.extractall(folder, members)
        return _finish(target, Path(folder))


def _is_python(name: str) -> bool:
    return name.startswith("vllm/") and not name.endswith(".so")


def _finish(target: Path, source: Path) -> Path:
    """Copy a vllm package; the installed one's libraries, and what it imports besides."""
    shutil.rmtree(target, ignore_errors=True)
    package = target / "vllm"
    shutil.copytree(
        source / "vllm", package, ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    [installed] = importlib.util.find_spec("vllm").submodule_search_locations
    for library in Path(installed).glob("*.so"):
        (package / library.name).symlink_to(library)
    if LATER:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        subprocess.run([*pip, "--target", target, *LATER], check=True, stdout=sys.stderr)
    compile_modules(package)
    return target


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("which", help="a minor such as 0.33, a wheel, or a checkout")
    print(make(parser.parse_args().which))
