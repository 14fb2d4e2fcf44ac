"""What an index gets, and what a user gets from it.

Both artefacts are built as a release builds them, and the wheel is installed into an
environment that has vLLM and nothing of this checkout.
"""

import email
import email.message
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from html.parser import HTMLParser
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import pytest
import torch
import yaml
from readme_renderer import markdown

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """What a command prints, without this suite's paths and options in its environment."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("PYTHON") and name not in ("VLLM_PLUGINS", "VIRTUAL_ENV")
    }
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, env={**inherited, **environment}
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def checkout() -> set[str]:
    """Its files, without what git ignores."""
    if not (ROOT / ".git").exists():
        pytest.skip("an sdist has not all the files of a checkout")
    listed = run(
        "git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT
    )
    return {name for name in listed.split("\0") if name and (ROOT / name).exists()}


class Built(NamedTuple):
    wheel: Path
    sdist: Path

    @property
    def metadata(self) -> email.message.Message:
        with zipfile.ZipFile(self.wheel) as wheel:
            (name,) = (n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
            return email.message_from_bytes(wheel.read(name))


@pytest.fixture(scope="module")
def built(checkout: set[str], tmp_path_factory: pytest.TempPathFactory) -> Built:
    source, artefacts = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in checkout:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    # As a checkout that was used has them.
    for name in (
        "build/lib/vllm_dca/left.py",
        "scripts/vllm_alias/build/left.txt",
        "scripts/vllm_alias/vllm.egg-info/PKG-INFO",
        "tests/__pycache__/left.cpython-311.pyc",
    ):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).touch()
    run(sys.executable, "-m", "build", "--outdir", artefacts, cwd=source)
    (wheel,), (sdist,) = artefacts.glob("*.whl"), artefacts.glob("*.tar.gz")
    return Built(wheel, sdist)


def test_wheel_has_the_package_and_nothing_else(built: Built, checkout: set[str]) -> None:
    with zipfile.ZipFile(built.wheel) as wheel:
        names = {n for n in wheel.namelist() if ".dist-info/" not in n}
    assert names == {n for n in checkout if n.startswith("vllm_dca/")}
    # What no `import` would miss.
    assert {"vllm_dca/cpu/compiled.cpp", "vllm_dca/cpu/few.h", "vllm_dca/py.typed"} <= names


def test_sdist_has_all_that_the_suite_needs(built: Built, checkout: set[str]) -> None:
    with tarfile.open(built.sdist) as sdist:
        names = {m.name.partition("/")[2] for m in sdist if m.isfile()}
    made = {n for n in names if n in ("PKG-INFO", "setup.cfg") or ".egg-info/" in n}
    # .gitignore and the like serve the repository.
    assert names - made == {n for n in checkout if not n.startswith(".")}
    assert {"LICENSE", "README.md", "scripts/test", "tests/test_package.py"} <= names


class Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.pictures: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if tag == "img" and name == "src":
                self.pictures.append(value or "")
            elif name in ("href", "src"):
                self.targets.append(value or "")


def test_an_index_takes_and_shows_the_description(built: Built) -> None:
    run(
        *(sys.executable, "-m", "twine", "check", "--strict", built.wheel, built.sdist),
        cwd=built.wheel.parent,
    )
    assert built.metadata["Description-Content-Type"] == "text/markdown"
    shown = markdown.render(built.metadata.get_payload())
    assert shown is not None
    links = Links()
    links.feed(shown)
    # It resolves no relative link, and has no file of the repository to show.
    elsewhere = [link for link in links.targets if not link.startswith("#")]
    assert elsewhere
    assert [link for link in elsewhere if urlsplit(link).scheme != "https"] == []
    assert links.pictures == []


BEFORE = """
from importlib.util import find_spec
assert find_spec("vllm") is not None
assert find_spec("vllm_dca") is None
"""


@pytest.fixture(scope="module")
def installed(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the suite's vLLM, and the wheel instead of this checkout."""
    site, others = Path(sysconfig.get_path("purelib")), tmp_path_factory.mktemp("others")
    ours = {
        file.parts[0]
        for distribution in metadata.distributions(name="vllm-dca", path=[str(site)])
        for file in distribution.files or ()
    }
    for entry in site.iterdir():
        if entry.name not in {*ours, "__pycache__"}:
            (others / entry.name).symlink_to(entry)
    environment = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", environment, cwd=environment)
    purelib = sysconfig.get_path("purelib", "venv", {"base": str(environment)})
    # As its own folder of packages, whose .pth files count: vLLM may be editable.
    Path(purelib, "others.pth").write_text(f"import site; site.addsitedir({str(others)!r})\n")
    run(environment / "bin" / "python", "-c", BEFORE, cwd=environment)
    run(
        *(environment / "bin" / "python", "-m", "pip", "install", "--no-deps", "--no-index"),
        built.wheel,
        cwd=environment,
    )
    return environment


ENTRY_POINTS = """
import json
from importlib import metadata
import vllm_dca
found = []
for group in ("vllm.general_plugins", "vllm.stat_logger_plugins", "console_scripts"):
    for point in metadata.entry_points(group=group):
        if point.dist.name == "vllm-dca":
            point.load()
            found.append(f"{group} {point.name}")
print(json.dumps([vllm_dca.__file__, found]))
"""


def test_entry_points_load_from_the_installed_wheel(installed: Path) -> None:
    printed = run(installed / "bin" / "python", "-c", ENTRY_POINTS, cwd=installed)
    file, found = json.loads(printed.splitlines()[-1])
    assert Path(file).is_relative_to(installed)
    assert found == [
        "vllm.general_plugins dca",
        "vllm.stat_logger_plugins dca",
        "console_scripts vllm-dca",
    ]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where torch keeps what it compiles, with nothing in it."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def doctor(installed: Path, compiled: Path) -> list[str]:
    printed = run(
        *(installed / "bin" / "vllm-dca", "doctor"),
        cwd=installed,
        TORCHINDUCTOR_CACHE_DIR=str(compiled),
    )
    return printed.splitlines()


def test_doctor_finds_no_problem_in_a_new_environment(doctor: list[str]) -> None:
    assert any(line.startswith("ok") and "--attention-backend dca" in line for line in doctor)
    assert [line for line in doctor if line.startswith("problem")] == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="the doctor asks a GPU's providers")
def test_kernel_compiles_from_the_installed_wheel(doctor: list[str], compiled: Path) -> None:
    (line,) = (line for line in doctor if "prefill by compiled" in line)
    assert line.startswith("ok"), line
    assert list(compiled.rglob("*.so"))


@pytest.mark.parametrize("name", ["bug", "model"])
def test_issue_form_asks_for_what_the_command_line_says(checkout: set[str], name: str) -> None:
    form: dict[str, Any] = yaml.safe_load(
        (ROOT / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml").read_text()
    )
    assert {"name", "description", "body"} <= set(form)
    kinds = {field["type"] for field in form["body"]}
    assert kinds <= {"markdown", "textarea", "input", "dropdown", "checkboxes"}
    required = [
        field["attributes"]["label"]
        for field in form["body"]
        if field.get("validations", {}).get("required")
    ]
    assert {"bug": "vllm-dca doctor", "model": "vllm-dca explain MODEL"}[name] in required
