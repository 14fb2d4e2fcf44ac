"""`scripts/gpu` as far as a machine without a GPU can run it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from scripts.common import record
from scripts.hardware import __main__ as hardware
from scripts.hardware import engine, parity
from scripts.hardware.__main__ import Step
from tests.cuda import test_gpu, test_kernels
from tests.helpers.pretended_gpu import pretended_gpu
from vllm_dca.cpu.device import by_kernel
from vllm_dca.cuda.plan_decode import DecodePlanner

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
    assert "All steps did: tests, kernels, providers, sparse_kernels." in done.stdout
    steps = load(results / "gpu.json")
    assert steps["commit"].startswith("unknown")
    assert [step["status"] for step in steps["results"]] == [0, 0, 0, 0]
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
    assert "3 passed" in (results / "gpu-tests.log").read_text()


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
    assert (tmp_path / "gpu-first.log").read_text() == "one\n"
    # On disk before the last one started.
    assert "'second'" in (tmp_path / "gpu-last.log").read_text()


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


def test_on_a_gpu_only_what_a_gpu_can_pass_is_run() -> None:
    found = {step.name: step for step in hardware.steps(True, False, Path("/results"))}
    assert [word for word in found["tests"].command if word.startswith("tests/")] == [
        "tests/cuda/test_kernels.py",
        "tests/cuda/test_caps_and_sinks.py",
        "tests/cuda/test_sparse.py",
        "tests/cuda/test_gpu.py",
    ]
    timed = {"kernels", "providers", "sparse_kernels"}
    assert timed | {"parity", "engine"} <= set(found)
    for step in found.values():
        assert "--dry-run" not in step.command


@pytest.mark.parametrize(
    ("step", "lengths"),
    [
        *((name, [(200, 130), (65, 0)]) for name in test_gpu.PREFILLS),
        ("decode", [(200, 199), (66, 63), (1, 0)]),
    ],
)
def test_the_gpus_tests_run_what_they_say(step: str, lengths: list[tuple[int, int]]) -> None:
    on_device = test_gpu.OnDevice(lengths)
    test_gpu.runs(on_device, step)()
    on_device.batch.assert_close(on_device.output.cpu())


def test_the_gpus_tests_of_graphs_and_waiting_hold_on_a_pretended_one() -> None:
    with pretended_gpu():
        test_gpu.test_a_captured_graph_replays_across_chunk_borders(3)
        test_gpu.test_nothing_synchronises("decode")


def test_a_graph_that_froze_its_lengths_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the replay test is for: a plan whose buffers are not those of the capture."""
    made = []

    class Moves(DecodePlanner):
        def plan(self, *args: Any) -> Any:
            planner = DecodePlanner(*made[-1])
            return planner.plan(*args)

        def __init__(self, *args: Any) -> None:
            made.append(args)
            super().__init__(*args)

    monkeypatch.setattr(test_kernels, "DecodePlanner", Moves)
    with pretended_gpu(), pytest.raises(AssertionError, match=r"> .* for Shape"):
        test_gpu.test_a_captured_graph_replays_across_chunk_borders(1)


def run(module: str, output: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", module, "--dry-run", "--output", str(output)]
    subprocess.run(command, cwd=ROOT, check=True)
    return load(output)


def test_vllm_takes_the_benchmarks_arguments(tmp_path: Path) -> None:
    found = run("scripts.hardware.engine", tmp_path / "engine.json")
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
    found = run("scripts.hardware.parity", tmp_path / "parity.json")
    assert found["failures"] == {}
    assert [row["model"] for row in found["results"]] == [*parity.MODELS]
    for row in found["results"]:
        [backends] = row["ran"]["backends"]
        assert f"DCA ({by_kernel().provider})" in backends
        assert len(backends) == (2 if "sliding_window" in parity.MODELS[row["model"]][1] else 1)
        distances = row["rms_from_fp64"]
        assert 0 < distances["engine"] <= 2 * distances["bf16 reference"]


def test_a_record_goes_on_where_the_same_run_was_cut_short(tmp_path: Path) -> None:
    output, facts = tmp_path / "record.json", {"commit": "a"}
    assert record.resumed(output, facts) == []
    record.write(output, {**facts, "results": [1]})
    assert record.resumed(output, facts) == [1]
    assert record.resumed(output, {"commit": "b"}) == []
    assert record.resumed(None, facts) == []
