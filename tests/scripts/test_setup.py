"""scripts/setup on machines whose pip knows no CPU build of torch."""

import os
import subprocess
from pathlib import Path

import pytest

from scripts.common.record import ROOT

# Stands for the Python of an environment: writes down what it is asked, and fails where told.
PYTHON = """#!/usr/bin/env bash
echo "$*" >>"$ASKED"
[[ " $* " =~ " pip show " || " $* " =~ $FAILS ]] && exit 1
[[ $1 == -c || $* == *requirement* ]] && cat >/dev/null
exit 0
"""


@pytest.mark.parametrize(
    ("fails", "returned", "last"),
    [
        ("nothing", 0, "guidellm"),
        ("torch==[0-9.]+.cpu", 0, "guidellm"),
        ("torch==", 1, "--torch-backend cpu"),
    ],
    ids=["pip has it", "PyTorch has it", "nobody has it"],
)
def test_where_torch_comes_from(fails: str, returned: int, last: str, tmp_path: Path) -> None:
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
    by_uv = [line for line in lines if line.startswith("-m uv pip install")]
    assert len(by_uv) == (fails != "nothing")
    assert all("--torch-backend cpu torch==" in line for line in by_uv)
    if returned:
        assert "no CPU build of torch" in run.stderr
