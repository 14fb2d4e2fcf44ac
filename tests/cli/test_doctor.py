"""`vllm-dca doctor`: what it finds here, and what it would find elsewhere."""

import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import Result

from tests.helpers.command_line import BLOCK, explained, run, without_a_platform
from vllm_dca.cpu.processor import Processor
from vllm_dca.engine import devices

pytestmark = pytest.mark.each_minor


def findings(result: Result | subprocess.CompletedProcess[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {"ok": [], "problem": [], "note": []}
    for line in result.stdout.splitlines():
        found[line[:9].rstrip()].append(line[9:])
    return found


def test_doctor_finds_nothing_here() -> None:
    import vllm

    result = run("doctor")
    assert result.exit_code == 0, result.output
    found = findings(result)
    assert found["problem"] == []
    said = "\n".join(found["ok"])
    for part in (
        f"vLLM {vllm.__version__}",
        "vLLM loads the plugin dca",
        "platform c",
        "prefill by",
        "shims in force: pickle_by_name, select_on_cpu",
        "patches in vLLM instead of shims: none",
        "dca selects vllm_dca.engine.backend.DcaBackend",
    ):
        assert part in said


def test_doctor_without_a_platform() -> None:
    result = without_a_platform("doctor")
    assert (result.returncode, result.stderr) == (1, "")
    found = findings(result)
    platform, prefill = found["problem"]
    assert platform.startswith("platform unknown: vLLM's build for CUDA sees no GPU")
    assert prefill == "nothing can compute the prefill on this platform"
    assert any(line.startswith("shims in force") for line in found["ok"])


@pytest.mark.parametrize(
    ("device", "capability", "verdict", "said"),
    [
        ("cuda", (9, 0), "ok", "platform cuda, compute capability 9.0"),
        (
            "cuda",
            (7, 5),
            "problem",
            "platform cuda, compute capability 7.5: DCA needs a GPU of",
        ),
        ("xpu", None, "problem", "platform xpu: DCA runs on cpu and cuda"),
    ],
)
def test_doctor_on_other_platforms(
    device: str,
    capability: tuple[int, int] | None,
    verdict: str,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vllm import platforms
    from vllm.platforms.interface import DeviceCapability

    from vllm_dca.cli import doctor

    platform = types.SimpleNamespace(
        device_type=device,
        is_cpu=lambda: False,
        is_cuda=lambda: device == "cuda",
        get_device_capability=lambda: capability and DeviceCapability(*capability),
    )
    monkeypatch.setattr(platforms, "_current_platform", platform)
    [found] = doctor._check_platform()
    assert found.verdict == verdict
    assert found.text.startswith(said)


def test_doctor_where_vllm_does_not_import(tmp_path: Path) -> None:
    broken = "libcudart.so.13: cannot open shared object file"
    (tmp_path / "vllm.py").write_text(f"raise OSError({broken!r})")
    path = os.pathsep.join((str(tmp_path), *filter(None, sys.path)))
    done = subprocess.run(
        [sys.executable, "-m", "vllm_dca", "doctor"],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout == f"problem  vLLM cannot be imported: {broken}\n"


def test_doctor_goes_on_after_a_check_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_dca.engine import providers

    def fail(_: Any) -> None:
        raise RuntimeError("the driver is gone")

    for device in providers.PROVIDERS:
        monkeypatch.setitem(providers.PROVIDERS, device, {"broken": fail})
    result = run("doctor")
    assert result.exit_code == 1
    found = findings(result)
    assert found["problem"] == ["providers: RuntimeError: the driver is gone"]
    assert found["ok"][-1].startswith("--attention-backend dca selects")


def test_doctor_on_an_untested_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm

    from vllm_dca.engine import shims

    monkeypatch.setattr(vllm, "__version__", "0.99.0")
    # In a new process nothing is cached.
    monkeypatch.setattr(shims, "apply", shims.apply.__wrapped__)
    result = run("doctor")
    assert result.exit_code == 1
    version, unavailable = findings(result)["problem"]
    assert version.startswith("vLLM 0.99.0 is not tested: install 0.32, 0.33")
    assert unavailable.startswith("DCA cannot be made available: vLLM 0.99.0 is installed")
    fitting = [line for line in findings(result)["note"] if line.endswith("fits this vLLM")]
    assert len(fitting) == len(shims.SHIMS)
    refused = run("explain", "any")
    assert refused.exit_code == 1
    assert "vLLM 0.99.0 is installed; tested are 0.32, 0.33" in refused.stderr


def test_doctor_where_what_a_shim_replaces_has_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    from vllm_dca.engine import shims

    monkeypatch.setattr(vllm, "__version__", "0.99.0")
    monkeypatch.setattr(shims, "apply", shims.apply.__wrapped__)
    monkeypatch.setattr(EngineArgs, "create_model_config", lambda self, more: None)
    monkeypatch.delattr(BaseModelLoader, "create_model")
    notes = findings(run("doctor"))["note"]
    assert any(
        "EngineArgs.create_model_config takes (self, more) in vLLM 0.99.0, and the shim "
        "extend_context was written for (self)" in line
        for line in notes
    )
    assert any(
        "create_model is gone from vLLM 0.99.0, and the shim prepare" in n for n in notes
    )
    assert "the shim select_on_cpu fits this vLLM" in notes


def test_doctor_where_vllm_keeps_the_plugin_out(monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm.envs

    vllm.envs.disable_envs_cache()  # an engine in this process may have turned it on
    monkeypatch.setenv("VLLM_PLUGINS", "another,one")
    result = run("doctor")
    assert result.exit_code == 1
    [problem] = findings(result)["problem"]
    assert problem.startswith("VLLM_PLUGINS=another,one keeps the plugin dca out")
    monkeypatch.setenv("VLLM_PLUGINS", "another,dca")
    assert run("doctor").exit_code == 0


def test_doctor_without_the_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.metadata

    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **_: ())
    result = run("doctor")
    assert result.exit_code == 1
    plugin, metrics = findings(result)["problem"]
    assert "is not installed: pip install" in plugin
    assert "is not installed, and this version's is vllm_dca.engine.metrics:" in metrics


def test_doctor_on_an_installation_from_before_the_code_moved(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import importlib.metadata

    found = importlib.metadata.entry_points
    old = importlib.metadata.EntryPoint(
        "dca", "vllm_dca.metrics:DcaStatLogger", "vllm.stat_logger_plugins"
    )

    def entry_points(**chosen: str) -> Any:
        return (old,) if chosen["group"] == old.group else found(**chosen)

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    result = run("doctor")
    assert result.exit_code == 1
    [problem] = findings(result)["problem"]
    assert "vllm_dca.metrics:DcaStatLogger, and this version's is vllm_dca.engine" in problem


def test_doctor_where_nothing_can_prefill(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_dca.engine import providers
    from vllm_dca.method.provider import Needs, UnusableProviderError

    def unusable(needs: Needs) -> Any:
        raise UnusableProviderError("it is out of order")

    monkeypatch.setitem(providers.PROVIDERS, "cpu", {"torch": unusable})
    monkeypatch.setitem(providers.PROVIDERS, "cuda", {"torch": unusable})
    result = run("doctor")
    assert result.exit_code == 1
    found = findings(result)
    assert "prefill by torch: no, because it is out of order" in found["note"]
    assert len(found["problem"]) == 1


@pytest.mark.usefixtures("no_compiler")
def test_doctor_without_a_compiler() -> None:
    result = run("doctor")
    assert result.exit_code == 0
    found = findings(result)
    note = "prefill by compiled: no, because it cannot be compiled here (no C++ compiler)"
    assert note in found["note"]
    assert any(line.startswith("prefill by torch") for line in found["ok"])


def test_doctor_where_vllm_selects_another(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.attention import selector

    monkeypatch.setattr(selector, "get_attn_backend", lambda *_: dict)
    result = run("doctor")
    assert result.exit_code == 1
    [problem] = findings(result)["problem"]
    assert problem.startswith("--attention-backend dca selects builtins.dict, not vllm_dca.")


LAPTOP = Processor("AVX2", None, torch.float32)
SERVER = Processor("AVX512", "AMX", torch.bfloat16)


@pytest.mark.parametrize(
    ("here", "advice"),
    [
        (
            LAPTOP,
            "with AVX2, no instruction that multiplies bfloat16: serve with --dtype float32",
        ),
        (SERVER, "with AVX512, which multiplies bfloat16 by AMX: serve with --dtype bfloat16"),
    ],
)
def test_doctor_says_which_dtype_to_serve_in(
    here: Processor, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "processor", lambda: here)
    [said] = [line for line in findings(run("doctor"))["ok"] if line.startswith("processor")]
    assert advice in said


def test_doctor_says_nothing_of_a_processor_beside_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(devices, "current_processor", lambda: None)
    result = run("doctor")
    assert result.exit_code == 0, result.output
    assert "processor" not in result.output


@pytest.mark.parametrize("operators", [[], ["cpu_gemm_wna16"]])
def test_doctor_says_where_4_bit_weights_are_not_served(
    operators: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.ops, "_C", types.SimpleNamespace(**dict.fromkeys(operators)))
    notes = findings(run("doctor"))["note"]
    assert any(line.startswith("4-bit weights") for line in notes) == (not operators)


@pytest.mark.parametrize(
    ("here", "dtype", "faster"),
    [
        (LAPTOP, "bfloat16", "float32"),
        (LAPTOP, "float16", "float32"),
        (SERVER, "float16", "bfloat16"),
        (LAPTOP, "float32", None),
        (SERVER, "float32", None),
        (SERVER, "bfloat16", None),
    ],
)
def test_a_dtype_that_the_processor_does_not_multiply_is_warned_of(
    here: Processor, dtype: str, faster: str | None, llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "processor", lambda: here)
    said = explained(llama, "--max-model-len", "1K", "--dtype", dtype, *BLOCK)
    warnings = said.get("warning", [])
    assert [f"--dtype {faster} is faster here" in line for line in warnings] == (
        [True] if faster else []
    )
