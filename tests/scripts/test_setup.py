"""scripts/setup without uv, with another Python, or where no index has torch for the CPU."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.common import pip_settings
from scripts.common.record import ROOT

# Stands for the Python of an environment: writes down what it is asked, and fails where told.
PYTHON = """#!/usr/bin/env bash
echo "$*" >>"$ASKED"
[[ " $* " =~ " uv pip " ]] && echo "${UV_COMPILE_BYTECODE-0}" >>"$ASKED.bytecode"
[[ " $* " =~ " pip show " || " $* " =~ $FAILS ]] && exit 1
[[ $1 == -c ]] && echo needed
exit 0
"""

# Stands for the Python of a machine, which is of a version that it is told.
OF_VERSION = """#!/usr/bin/env bash
case $1 in
-c) exec "$REAL" -c "import sys; sys.version_info = ($VERSION, 1); $2" ;;
--version) echo "Python ${VERSION/, /.}.1" ;;
-m) mkdir -p "$3/bin" && cp "$STANDING" "$3/bin/python" ;;
esac
"""


def set_up(folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [ROOT / "scripts/setup"],
        env={**os.environ, "VENV": str(folder / "venv"), **variables},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def written(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(script)
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("fails", "returned", "last"),
    [
        ("nothing", 0, "guidellm"),
        ("pip install -qq uv", 0, "guidellm"),
        ("pip_settings", 0, "guidellm"),
        ("uv pip install", 0, "guidellm"),
        ("torch==[0-9.]+.cpu", 0, "guidellm"),
        ("torch==", 1, "--torch-backend cpu"),
    ],
    ids=[
        "the index has it",
        "no uv",
        "pip's alone",
        "uv fails",
        "PyTorch has it",
        "nobody has it",
    ],
)
def test_who_installs_and_where_torch_comes_from(
    fails: str, returned: int, last: str, tmp_path: Path
) -> None:
    written(tmp_path / "venv/bin/python", PYTHON)
    asked = tmp_path / "asked"
    run = set_up(tmp_path, ASKED=str(asked), FAILS=fails)
    assert run.returncode == returned, run.stderr
    lines = asked.read_text().splitlines()
    assert last in lines[-1]
    installed = [line for line in lines if " install " in line and not line.endswith(" uv")]
    from_pytorch = [line for line in installed if "--torch-backend cpu torch==" in line]
    by_pip = [line for line in installed if line.startswith("-m pip ")]
    by_uv = [
        line for line in installed if line.startswith("-m uv ") and line not in from_pytorch
    ]
    if fails in ("pip install -qq uv", "pip_settings"):
        assert not by_uv
    else:  # What uv does not install, pip tries.
        wanted = [line.split()[-1] for line in by_uv if re.search(fails, line)]
        assert [line.split()[-1] for line in by_pip] == wanted
    assert len(from_pytorch) == ("torch" in fails)
    if returned:
        assert "no CPU build of torch" in run.stderr


def of_version(folder: Path, version: str) -> dict[str, str]:
    standing = written(folder / "standing", PYTHON)
    return {
        "PATH": f"{written(folder / 'bin/python3', OF_VERSION).parent}:{os.environ['PATH']}",
        "REAL": sys.executable,
        "VERSION": version,
        "STANDING": str(standing),
        "ASKED": str(folder / "asked"),
        "FAILS": "nothing",
    }


@pytest.mark.parametrize("version", ["3, 10", "3, 15"])
def test_a_python_that_vllm_does_not_take_makes_no_venv(version: str, tmp_path: Path) -> None:
    run = set_up(tmp_path, **of_version(tmp_path, version))
    assert run.returncode == 1
    found = version.replace(", ", ".")
    assert f"python3 is Python {found}.1; vLLM takes Python 3.11 to 3.14." in run.stderr
    assert "PYTHON=python3.12 scripts/setup" in run.stderr
    assert not (tmp_path / "venv").exists()


def test_a_venv_of_such_a_python_is_the_user_s_to_remove(tmp_path: Path) -> None:
    python = written(tmp_path / "venv/bin/python", OF_VERSION)
    run = set_up(tmp_path, **of_version(tmp_path, "3, 10"))
    assert run.returncode == 1
    assert f"{python} is Python 3.10.1" in run.stderr
    assert f"Remove {tmp_path / 'venv'}" in run.stderr
    assert python.exists()


def test_another_python_is_named(tmp_path: Path) -> None:
    variables = of_version(tmp_path, "3, 14")
    missing = set_up(tmp_path, **variables, PYTHON="python3.99")
    assert missing.returncode == 1
    assert "python3.99 is no Python; vLLM takes" in missing.stderr
    written(tmp_path / "bin/python3", "exit 1")
    named = written(tmp_path / "bin/named", OF_VERSION)
    run = set_up(tmp_path, **variables, PYTHON=named.name)
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "venv/bin/python").read_text() == PYTHON


def test_uv_is_told_what_pip_is_told() -> None:
    listed = """\
:env:.find-links='/one /two'
global.extra-index-url='https://a.example\\nhttps://b.example'
global.find-links='/three'
global.progress-bar='off'
install.index-url='https://its.example/simple'
"""
    settings = pip_settings.told(listed)
    assert sorted(pip_settings.exports(settings)) == [
        "export UV_DEFAULT_INDEX=https://its.example/simple",
        "export UV_FIND_LINKS=/one,/two",
        "export UV_INDEX='https://a.example https://b.example'",
        "export UV_INDEX_STRATEGY=unsafe-best-match",
    ]
    with pytest.raises(KeyError, match="client-cert"):
        pip_settings.exports(pip_settings.told("global.client-cert='mine.pem'\n"))


@pytest.mark.parametrize("variable", ["", "1"])
def test_bytecode_is_compiled_where_imports_leave_none(
    variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all packages: without it, a process that imports vLLM does so for a minute or more."""
    written(tmp_path / "venv/bin/python", PYTHON)
    asked = tmp_path / "asked"
    monkeypatch.delenv("UV_COMPILE_BYTECODE", raising=False)
    run = set_up(tmp_path, ASKED=str(asked), FAILS="nothing", PYTHONDONTWRITEBYTECODE=variable)
    assert run.returncode == 0, run.stderr
    told = Path(f"{asked}.bytecode").read_text().split()
    assert len(told) > 4
    assert {*told} == {variable or "0"}
