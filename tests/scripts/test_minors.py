"""Another minor of vLLM beside the installed one, and what is said to have moved."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.common.record import ROOT
from scripts.common.serving import VLLM
from scripts.minors import overlay, report
from tests.helpers import checkpoints
from vllm_dca.engine.shims import TESTED_VLLM

PATCHES = ROOT / "patches"


@pytest.fixture
def overlays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(overlay, "OVERLAYS", tmp_path / "minors")
    monkeypatch.setattr(overlay, "LATER", ())
    return tmp_path / "minors"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A vLLM to come: a package with a library of its own, which cannot be used here."""
    package = tmp_path / "checkout" / "vllm"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("__version__ = '0.99.0'\n")
    (package / "_C.abi3.so").write_text("for another torch")
    return package.parent


def test_an_overlay_has_the_others_python_and_the_installed_libraries(
    overlays: Path, checkout: Path
) -> None:
    made = overlay.make(str(checkout))
    assert made == overlays / "checkout"
    run = subprocess.run(
        [sys.executable, "-c", "import vllm; print(vllm.__version__)"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(made)},
    )
    assert run.stdout.strip() == "0.99.0"
    # Whether imports may leave it or not.
    assert list(made.glob("vllm/__pycache__/__init__.*.pyc"))
    library = made / "vllm" / "_C.abi3.so"
    assert library.is_symlink()
    assert library.stat().st_size > len("for another torch")


@pytest.mark.parametrize("which", ["nonsense", "."])
def test_what_is_no_vllm_is_refused(which: str, overlays: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"is no minor of vLLM|has no vllm/__init__\.py"):
        overlay.make(which if which == "nonsense" else str(tmp_path))


def test_a_patch_that_no_longer_applies_is_named(tmp_path: Path) -> None:
    [platform] = PATCHES.glob("0002-*.patch")
    target = tmp_path / "patches"
    target.mkdir()
    shutil.copy(platform, target)
    import vllm

    installed = Path(vllm.__file__).parent
    assert report.patches_that_do_not_apply(target, installed.parent) == []
    moved = tmp_path / "site" / "vllm" / "platforms"
    moved.mkdir(parents=True)
    source = (installed / "platforms" / "cpu.py").read_text()
    (moved / "cpu.py").write_text(source.replace("attn_selector_config", "selector_config"))
    [broken] = report.patches_that_do_not_apply(target, moved.parents[1])
    assert broken.startswith(platform.name)
    assert "vllm/platforms/cpu.py" in broken


def test_an_import_that_is_gone_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "ROOT", tmp_path)
    (tmp_path / "uses.py").write_text(
        "from vllm.config import VllmConfig, Gone\n"
        "from vllm.platforms import current_platform\n"
        "import vllm.gone\n"
        "try:\n    import vllm.elsewhere\nexcept ImportError:\n    pass\n"
    )
    name, module = report.imports_that_are_gone([tmp_path])
    assert name.startswith("uses.py: ")
    assert "vllm.config.Gone" in name
    assert "vllm.gone" in module


def test_vllm_serve_on_an_untested_minor_says_what_works(tmp_path: Path) -> None:
    """The plugin stays out and says why; vLLM then refuses a name that it does not know."""
    import vllm

    model = checkpoints.write(tmp_path / "model", "LlamaConfig")
    later = tmp_path / "later"
    later.mkdir()
    # Links, which cost nothing; what says the version is a file of its own.
    subprocess.run(["cp", "-rs", Path(vllm.__file__).parent, later], check=True)
    for name in ("version.py", "_version.py"):
        (later / "vllm" / name).unlink(missing_ok=True)
    (later / "vllm/version.py").write_text(
        "__version__ = '0.99.0'\n__version_tuple__ = (0, 99, 0)\n"
    )
    run = subprocess.run(
        [VLLM, "serve", str(model), "--attention-backend", "dca"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(later), *sys.path[:1]])},
    )
    said = run.stdout + run.stderr
    assert run.returncode != 0
    assert (
        "The attention backend DCA is not available: vLLM 0.99.0 is installed; tested are "
        f"{', '.join(TESTED_VLLM)}" in said
    )
    assert "Unknown attention backend: 'DCA'" in said
