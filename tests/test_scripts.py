"""The scripts for a GPU, as far as a machine without one can run them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import bench_kernels
import pytest
import torch
from layer import Layer

from tests import interpreter
from tests.paged import DEVICE
from vllm_dca.kernels.attention import attention
from vllm_dca.kernels.merge import merge_parts
from vllm_dca.kernels.turn import turn_queries
from vllm_dca.prefill import PrefillOperations

ROOT = Path(__file__).parents[1]
interpreter.repair()


def test_benchmark_checks_its_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_kernels, "DEVICE", str(DEVICE))
    monkeypatch.setattr(bench_kernels, "multiprocessors", lambda: 1)
    shape = ("tiny", 4, 2, 32, 48, 16)
    layer = bench_kernels.DecodingLayer(shape, batch=2, context=150)
    layer.decode(layer.plan_decode())
    layer.check()
    layer.output.mul_(1.1)
    with pytest.raises(AssertionError, match="tiny, 150 tokens"):
        layer.check()

    layer = Layer(shape, 1, 100, 100, torch.bfloat16, bench_kernels.PAGE, str(DEVICE))
    operations = PrefillOperations(turn_queries, attention, merge_parts)
    layer.prefill(layer.plan_prefill(layer.geometry), operations)
    layer.check()


def test_kernels_compile_for_every_card_without_spills(tmp_path: Path) -> None:
    output = tmp_path / "kernels.json"
    subprocess.run(
        [sys.executable, ROOT / "scripts/compile_kernels.py", "--quick", "--output", output],
        check=True,
        env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path / "cache")},
    )
    kernels = json.loads(output.read_text())["kernels"]
    assert {kernel["capability"] for kernel in kernels} == {80, 90, 100}
    assert len({kernel["kernel"] for kernel in kernels}) == 7
    assert not any(kernel["spilled_bytes"] for kernel in kernels)
