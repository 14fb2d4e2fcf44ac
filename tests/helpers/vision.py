"""torchvision's Python, which vLLM's multimodal modules import, beside a CPU torch.

The index has CUDA builds only, whose library a CPU torch cannot load. Text needs none of its
operators; they only have to exist when its Python is imported.
"""

import fcntl
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import MutableMapping
from pathlib import Path

import pytest

from scripts.common.bytecode import compile_modules
from scripts.common.record import ROOT

# The one that goes with the torch that scripts/setup installs.
VERSION = "0.28.0"
FOLDER = ROOT / f".cache/torchvision-{VERSION}"
_DECLARED = """import torch as _torch
_operators = _torch.library.Library("torchvision", "DEF")
for _name in {names}:
    _operators.define(_name + "(Tensor x) -> Tensor")
"""
_OPERATORS = (
    "nms",
    "roi_align",
    "_roi_align_backward",
    "roi_pool",
    "_roi_pool_backward",
    "ps_roi_align",
    "_ps_roi_align_backward",
    "ps_roi_pool",
    "_ps_roi_pool_backward",
    "deform_conv2d",
    "_deform_conv2d_backward",
    "_cuda_version",
    "qnms",
)


def folder() -> Path:
    """The folder that has it; made if it is not there."""
    FOLDER.parent.mkdir(exist_ok=True)
    with FOLDER.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not FOLDER.exists():
            _download()
    return FOLDER


def _download() -> None:
    with tempfile.TemporaryDirectory(dir=FOLDER.parent) as temporary:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        wanted = ["--dest", temporary, f"torchvision=={VERSION}"]
        subprocess.run([*pip, *wanted], check=True, stdout=sys.stderr)
        [wheel] = Path(temporary).glob("*.whl")
        unpacked = Path(temporary, "unpacked")
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if not name.endswith((".so", "/"))]
            archive.extractall(unpacked, [n for n in names if ".libs/" not in n])
        init = unpacked / "torchvision/__init__.py"
        init.write_text(_DECLARED.format(names=_OPERATORS) + init.read_text())
        compile_modules(unpacked)
        unpacked.rename(FOLDER)


def for_children_of(patch: pytest.MonkeyPatch) -> None:
    """Have processes that a test starts find it: transformers looks when it is imported."""
    path = [*sys.path]
    environment = dict(os.environ)
    for_children(environment, path)
    patch.setenv("PYTHONPATH", environment["PYTHONPATH"])
    patch.setattr(sys, "path", path)


def for_children(environment: MutableMapping[str, str], path: list[str]) -> None:
    """Have processes that this one starts find it, however they are started.

    Args:
        environment: os.environ, or what stands in for it.
        path: sys.path, or what stands in for it.
    """
    found = str(folder())
    before = environment.get("PYTHONPATH")
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (found, before)))
    path.insert(0, found)
