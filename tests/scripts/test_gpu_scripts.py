"""The scripts for a GPU, as far as a machine without one can run them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from scripts.bench import kernels
from scripts.bench.layer import Layer
from tests.helpers import interpreter
from tests.helpers.paged import DEVICE
from vllm_dca.cuda.merge import merge_parts
from vllm_dca.cuda.paged_pass import attention
from vllm_dca.cuda.turn import turn_queries
from vllm_dca.method.device import PrefillOperations

ROOT = Path(__file__).parents[2]
interpreter.repair()


def test_benchmark_checks_its_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "DEVICE", str(DEVICE))
    monkeypatch.setattr(kernels, "multiprocessors", lambda: 1)
    shape = ("tiny", 4, 2, 32, 48, 16)
    layer = kernels.DecodingLayer(shape, batch=2, context=150)
    layer.decode(layer.plan_decode())
    layer.check()
    layer.output.mul_(1.1)
    with pytest.raises(AssertionError, match="tiny, 150 tokens"):
        layer.check()

    layer = Layer(shape, 1, 100, 100, torch.bfloat16, kernels.PAGE, str(DEVICE))
    operations = PrefillOperations(turn_queries, attention, merge_parts)
    layer.prefill(layer.plan_prefill(layer.geometry), operations)
    layer.check()


def test_kernels_compile_and_fit(tmp_path: Path) -> None:
    output = tmp_path / "kernels.json"
    subprocess.run(
        [sys.executable, "-m", "scripts.bench.compile_kernels", "--quick", "--output", output],
        check=True,
        cwd=ROOT,
        env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path / "cache")},
    )
    kernels = json.loads(output.read_text())["kernels"]
    shared = {80: 166_912, 90: 232_448}
    assert {kernel["capability"] for kernel in kernels} == set(shared)
    assert {kernel["shape"] for kernel in kernels} == {"Llama-3-8B", "MQA"}
    assert len({kernel["kernel"] for kernel in kernels}) == 7
    for kernel in kernels:
        assert not kernel["spilled_bytes"]
        assert kernel["shared_bytes"] <= shared[kernel["capability"]]
