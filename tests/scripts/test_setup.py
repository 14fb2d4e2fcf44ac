"""scripts/setup on machines without uv, or whose index has no CPU build of torch."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from scripts.common import pip_settings
from scripts.common.record import ROOT

# Stands for the Python of an environment: writes down what it is asked, and fails where told.
PYTHON = """#!/usr/bin/env bash
echo "$*" >>"$ASKED"
[[ " $* " =~ " pip show " || " $* " =~ $FAILS ]] && exit 1
[[ $1 == -c ]] && echo needed
exit 0
"""


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
    python = tmp_path / "venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(PYTHON)
    python.chmod(0o755)
    asked = tmp_path / "asked"
    variables = {"VENV": str(tmp_path / "venv"), "ASKED": str(asked), "FAILS": fails}
    run = subprocess.run(
        [ROOT / "scripts/setup"],
        env={**os.environ, **variables},
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
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
