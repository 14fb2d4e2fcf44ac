"""`scripts/gpu` as far as a machine without a GPU can run it."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.config.compilation import CompilationConfig, CompilationMode, CUDAGraphMode

from scripts.common import record
from scripts.hardware import __main__ as hardware
from scripts.hardware import engine, parity
from scripts.hardware.__main__ import Step
from tests.helpers import inprocess
from vllm_dca.cpu.device import by_kernel

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="rehearses for want of one")

# A bare machine has torch, NumPy, Triton, pytest and hypothesis, and what these bring along.
MISSING = ("vllm", "transformers", "rich", "typer", "psutil", "xformers", "accelerate", "ray")
BARE = f"""
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {MISSING}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
"""


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def gpu(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        ["scripts/gpu", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHON": sys.executable, **environment},
        text=True,
        capture_output=True,
    )


def test_a_bare_machine_rehearses_every_step(tmp_path: Path) -> None:
    """Neither git nor any package but the five is there."""
    bare, results = tmp_path / "bare", tmp_path / "results"
    bare.mkdir()
    (bare / "sitecustomize.py").write_text(BARE)
    for tool in ("bash", "env", "dirname"):
        (bare / tool).symlink_to(str(shutil.which(tool)))
    done = gpu(
        "--dry-run",
        str(results),
        PATH=str(bare),
        PYTHONPATH=str(bare),
        PYTEST_DISABLE_PLUGIN_AUTOLOAD="1",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (
        "All steps did: test_decode, test_prefill, kernels, providers, sparse_kernels."
        in done.stdout
    )
    steps = load(results / "gpu.json")
    assert steps["commit"].startswith("unknown")
    assert [step["status"] for step in steps["results"]] == [0] * 5
    kernels = load(results / "gpu-kernels.json")
    assert {row["step"] for row in kernels["results"]} == {"decode", "prefill"}
    assert (kernels["provider"], kernels["flash_attention"]) == ("triton", "n/a")
    assert {row["flash_ms"] for row in kernels["results"]} == {"n/a"}
    providers = load(results / "gpu-providers.json")
    timed = [list(row["milliseconds"]) for row in providers["results"]]
    assert timed == [["triton", "triton_passes"]] * 2
    assert set(providers["cannot"]) == {"vllm_flash_attn", "flash_attn", "xformers"}
    sparse = load(results / "gpu-sparse_kernels.json")
    assert {row["rule"] for row in sparse["results"]} == {"budgets", "coverage"}
    log = (results / "gpu.log").read_text()
    assert "1 passed" in log  # of test_decode
    assert "2 passed" in log  # of test_prefill


def test_without_a_gpu_nothing_is_measured(tmp_path: Path) -> None:
    done = gpu(str(tmp_path))
    assert done.returncode == 1
    assert "There is no GPU" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_step_that_fails_does_not_end_the_run(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def step(name: str, code: str) -> Step:
        return Step(name, [sys.executable, "-c", code])

    last = f"import json; print(json.load(open({str(tmp_path / 'gpu.json')!r}))['failures'])"
    with pytest.raises(SystemExit) as end:
        hardware.run_all(
            [
                step("first", "print('one'); raise SystemExit(3)"),
                Step("second", ["/nowhere/python"]),
                step("last", last),
            ],
            tmp_path,
            {},
        )
    report = str(end.value)
    assert report.startswith("FAILED:\nfirst: ")
    assert "status 3" in report
    assert "second: FileNotFoundError" in report
    found = load(tmp_path / "gpu.json")
    assert [(row["step"], row["status"]) for row in found["results"]] == [
        ("first", 3),
        ("last", 0),
    ]
    log = (tmp_path / "gpu.log").read_text()
    assert "\none\n== second: /nowhere/python\n" in log
    # On disk before the last one started.
    assert "'second'" in log.partition("== last: ")[2]
    hardware.run_all([step("first", "")], tmp_path, {})
    found = load(tmp_path / "gpu.json")
    assert [(row["step"], row["status"]) for row in found["results"]] == [
        ("last", 0),
        ("first", 0),
    ]
    assert (tmp_path / "gpu.log").read_text().startswith(log)


def test_a_case_that_fails_leaves_the_others(tmp_path: Path) -> None:
    journal = record.Journal(tmp_path / "found.json", {"device": "none"})
    for number in (1, 0, 2):
        with journal.attempt(f"1 / {number}"):
            journal.add({"of": number, "is": 1 / number})
    found = load(tmp_path / "found.json")
    assert [row["of"] for row in found["results"]] == [1, 2]
    assert found["failures"] == {"1 / 0": "ZeroDivisionError: division by zero"}
    with pytest.raises(SystemExit, match="1 / 0: ZeroDivisionError"):
        journal.end()


def steps(*only: str, engine: bool = False) -> dict[str, Step]:
    """On a machine with a GPU."""
    names = hardware.chosen(only, engine, dry_run=False)
    return {name: hardware.step(name, False, Path("/results")) for name in names}


@pytest.fixture
def sanitizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "bin/compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")


@pytest.mark.usefixtures("sanitizer")
def test_on_a_gpu_only_what_a_gpu_can_pass_is_run() -> None:
    found = steps(engine=True)
    assert [*found] == [*hardware.NAMES]
    assert [*steps()] == [name for name in found if name not in ("parity", "engine")]
    files = [word for step in found.values() for word in step.command if word[:6] == "tests/"]
    assert files[:5] == [
        "tests/cuda/test_gpu.py",
        "tests/cuda/test_decode.py",
        "tests/cuda/test_prefill.py",
        "tests/cuda/test_caps_and_sinks.py",
        "tests/cuda/test_sparse_prefill.py",
    ]
    for file in files:
        assert (ROOT / file).exists()
    for step in found.values():
        assert "--dry-run" not in step.command


@pytest.mark.usefixtures("sanitizer")
def test_steps_write_different_files() -> None:
    outputs = [
        Path(step.command[step.command.index("--output") + 1]).name
        for step in steps(engine=True).values()
        if "--output" in step.command
    ]
    assert {"gpu-kernels.json", "gpu-engine.json"} <= {*outputs}
    files = [*outputs, "gpu.json", "gpu.log"]
    assert len({*files}) == len(files)


def test_a_gpu_tries_few_random_cases_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each compiles kernels."""
    monkeypatch.delenv("DCA_CASES", raising=False)
    assert {steps(name)[name].environment["DCA_CASES"] for name in hardware.TESTS} == {"4"}
    monkeypatch.setenv("DCA_CASES", "50")
    found = steps("test_decode")["test_decode"]
    assert str(found).startswith("DCA_CASES=50 ")


@pytest.mark.usefixtures("sanitizer")
def test_the_sanitizer_sees_every_allocation() -> None:
    """In the segments of torch's allocator nothing is out of bounds."""
    found = steps("sanitizer")["sanitizer"]
    assert found.environment == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    assert str(found).startswith("PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer ")


def test_a_step_has_its_environment(tmp_path: Path) -> None:
    show = "import os; print(os.environ['SHOWN'], 'PATH' in os.environ)"
    shown = Step("shown", [sys.executable, "-c", show], {"SHOWN": "so it is"})
    assert hardware.run(shown, tmp_path / "log") == 0
    log = (tmp_path / "log").read_text()
    assert log.startswith("== shown: SHOWN='so it is' ")
    assert log.endswith("\nso it is True\n")


def test_steps_are_chosen_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [*steps("engine", "test_gpu")] == ["test_gpu", "engine"]
    assert hardware.chosen(["providers"], False, dry_run=True) == ["providers"]
    monkeypatch.setenv("PATH", "/nowhere")
    assert "sanitizer" not in steps()
    for only, dry_run, why in (
        ("sanitizer", False, "compute-sanitizer is not on the path"),
        ("test_gpu", True, "it needs a GPU"),
    ):
        with pytest.raises(ValueError, match=f"--only {only}: {why}"):
            hardware.chosen([only], False, dry_run)


def test_help_names_the_steps() -> None:
    words = gpu("--help").stdout.replace(",", " ").split()
    assert {*hardware.NAMES} <= {*words}
    assert "invalid choice: 'nothing'" in gpu("--only", "nothing").stderr


def rehearsed(main: Callable[[], None], output: Path) -> dict[str, Any]:
    """A command's record, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [main.__module__, "--dry-run", "--output", str(output)])
        main()
    return load(output)


def test_vllm_takes_the_benchmarks_arguments(tmp_path: Path) -> None:
    found = rehearsed(engine.main, tmp_path / "engine.json")
    assert found["failures"] == {}
    assert len(found["results"]) == 2 * len(engine.CASES)
    assert {row["max_model_len"] for row in found["results"]} == {engine.LONGEST}


def test_a_log_tells_which_attention_ran() -> None:
    dca = (
        "INFO [cuda.py:461] Using DCA backend.\n"
        "INFO [remap.py:98] DCA attends 32 layers: a .. b; prefill by vllm_flash_attn\n"
    )
    own = "INFO Using FLASH_ATTN attention backend out of potential backends: ['FLASH_ATTN'].\n"
    assert engine.ran(dca, "DCA") == "DCA (vllm_flash_attn)"
    assert engine.ran(own, "vLLM's own") == "FLASH_ATTN"
    for log, by in ((own, "DCA"), (dca, "vLLM's own"), (dca + own, "vLLM's own"), ("", "DCA")):
        with pytest.raises(RuntimeError, match="does not say"):
            engine.ran(log, by)


def test_the_engine_is_held_against_the_reference(tmp_path: Path) -> None:
    found = rehearsed(parity.main, tmp_path / "parity.json")
    assert found["failures"] == {}
    assert [row["model"] for row in found["results"]] == [*parity.MODELS]
    for row in found["results"]:
        [backends] = row["ran"]["backends"]
        assert f"DCA ({by_kernel().provider})" in backends
        assert len(backends) == (2 if "sliding_window" in parity.MODELS[row["model"]][1] else 1)
        distances = row["rms_from_fp64"]
        assert 0 < distances["engine"] <= 2 * distances["bf16 reference"]


def test_on_a_gpu_the_engine_compiles_and_has_graphs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As it is asked for, and as it is found."""
    asked: list[dict[str, Any]] = []

    def engine(model: Path, **options: Any) -> Any:
        asked.append({**inprocess.EXECUTION, **options})
        raise NotImplementedError

    monkeypatch.setattr(inprocess, "engine", engine)
    for dry_run in (False, True):
        with pytest.raises(NotImplementedError):
            parity.by_engine(tmp_path, False, dry_run)
    assert asked[1]["enforce_eager"]
    served = CompilationConfig(**asked[0]["compilation_config"])
    assert served.mode == CompilationMode.VLLM_COMPILE
    assert served.cudagraph_mode == CUDAGraphMode.FULL_AND_PIECEWISE
    parity.check_execution(served)
    for less in ({"mode": 0}, {"cudagraph_mode": "FULL_DECODE_ONLY"}):
        found = CompilationConfig(**{**asked[0]["compilation_config"], **less})
        with pytest.raises(AssertionError, match="FULL_AND_PIECEWISE"):
            parity.check_execution(found)


def test_a_record_goes_on_where_the_same_run_was_cut_short(tmp_path: Path) -> None:
    output, facts = tmp_path / "record.json", {"commit": "a"}
    assert record.resumed(output, facts) == []
    record.write(output, {**facts, "results": [1]})
    assert record.resumed(output, facts) == [1]
    assert record.resumed(output, {"commit": "b"}) == []
    assert record.resumed(None, facts) == []
