"""What `tests/cuda` does on a GPU, as far as a machine without one can tell."""

import dataclasses
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import triton.language as tl
from hypothesis import given, settings
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from scripts.hardware import __main__ as hardware
from tests.cuda import test_gpu
from tests.helpers import caches, interpreter, kernels, paged
from tests.helpers.paged import CPU_OPERATIONS, Shape
from tests.helpers.simulated_gpu import simulated_gpu
from vllm_dca.cuda import sparse_attend, sparse_probe
from vllm_dca.cuda.plan_decode import DecodePlanner
from vllm_dca.cuda.tuning import Tuning
from vllm_dca.method.prefill import by_passes
from vllm_dca.method.provider import AttentionProvider, PagedSegments
from vllm_dca.method.rotary import turn_queries
from vllm_dca.method.vertical_slash import Rule

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="rehearses for want of one")


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


def test_gpu_tests_hold_on_a_simulated_gpu() -> None:
    with simulated_gpu():
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

    monkeypatch.setattr(kernels, "DecodePlanner", Moves)
    with simulated_gpu(), pytest.raises(AssertionError, match=r"> .* for Shape"):
        test_gpu.test_a_captured_graph_replays_across_chunk_borders(1)


def test_the_gpus_sparse_prefill_runs_as_it_is_set_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU's size as it is planned; all of it smaller, in tiles that interpreting likes."""
    test_gpu.all_sparse(test_gpu.LONG)
    sizes = {"lengths": [(820, 256)], "chunk_len": 512, "local_size": 128}
    small = dataclasses.replace(test_gpu.LONG, num_kv_heads=1, group=1, **sizes)
    monkeypatch.setattr(test_gpu, "LONG", small)
    monkeypatch.setattr(sparse_attend, "prefill_tuning", lambda *_: Tuning(32, 64, 4, 3, 255))
    for module in (sparse_attend, sparse_probe):
        monkeypatch.setattr(module, "turn_queries", turn_queries)
    test_gpu.test_sparse_prefill_of_a_real_size(Rule(None, None, 0.9, 64))


def by_whole_pages(too_many: int = 0) -> AttentionProvider:
    """As flash-attention 3 reads pages: values past the keys are multiplied by 0, not left out.

    Of as many keys too many, if that is asked for.
    """

    def attention(
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        output: torch.Tensor,
        *,
        segments: PagedSegments,
        softmax_scale: float,
        **_: Any,
    ) -> torch.Tensor:
        lse = torch.empty(query.shape[1], len(query))
        first = 0
        for rows, keys, pages in zip(
            segments.query_lens, segments.key_lens, segments.block_table, strict=True
        ):
            own, first = slice(first, first + int(rows)), first + int(rows)
            pages = pages[: -(-int(keys) // key_cache.shape[1])]
            group = query.shape[1] // key_cache.shape[2]
            # [heads, tokens, head_size]
            key, value = (
                cache[pages].flatten(0, 1).float().repeat_interleave(group, 1).transpose(0, 1)
                for cache in (key_cache, value_cache)
            )
            scores = query[own].float().transpose(0, 1) @ key.mT * softmax_scale
            last = torch.full((int(rows),), int(keys) - 1 + too_many)
            if segments.causal:
                last -= torch.arange(int(rows)).flip(0)
            scores.masked_fill_(torch.arange(key.shape[1]) > last[:, None], -torch.inf)
            output[own] = (scores.softmax(-1) @ value).transpose(0, 1)
            lse[:, own] = scores.logsumexp(-1)
        return lse

    return attention


def test_a_provider_may_multiply_what_it_does_not_weigh(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a GPU it is told from one that weighs a key too many."""
    name = "vllm_flash_attn"
    monkeypatch.setattr(test_gpu, "PIECES", [(530, 0), (700, 699), (512, 511)])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(
        test_gpu, "prefill_by", lambda by: by_passes(CPU_OPERATIONS._replace(attend=by))
    )

    def check(attention: AttentionProvider) -> None:
        monkeypatch.setitem(test_gpu.PROVIDERS["cuda"], name, lambda needs: attention)
        test_gpu.test_every_provider_that_is_here_agrees(name, torch.bfloat16, 64, None)

    check(by_whole_pages())
    with pytest.raises(AssertionError, match="for Shape"):
        check(by_whole_pages(too_many=1))


def test_a_card_meets_the_caches_that_triton_can_read_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    both = {torch.float8_e4m3fn, torch.float8_e5m2}
    assert {*caches.fp8_dtypes()} == both
    monkeypatch.setattr(paged, "DEVICE", torch.device("cuda"))
    for capability in ((8, 0), (8, 6), (8, 9), (9, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda of=capability: of)
        found = {*caches.fp8_dtypes()}
        assert found == (both if capability >= (8, 9) else {torch.float8_e5m2})
        drawn = set()

        @settings(max_examples=40, database=None, derandomize=True)
        @given(kernels.cached_shapes())
        def draw(shape: Shape) -> None:
            drawn.add(shape.cache_dtype)  # noqa: B023

        draw()
        assert drawn == {None, *found}


# What a machine with an A100 says of itself; its tests are collected, and none is run.
A100 = """
import torch
torch.cuda.is_available = lambda: True
torch.cuda.get_device_capability = lambda *device: (8, 0)
"""


def test_on_a_card_no_test_wants_a_cache_that_it_has_not(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(A100)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", *hardware.TEST_FILES.values()],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}", "TRITON_INTERPRET": "0"},
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test_every_provider_that_is_here_agrees[vllm_flash_attn" in done.stdout
    assert "test_reads_fp8_caches[as served-cache_dtype0]" in done.stdout
    assert "test_reads_fp8_caches[as served-cache_dtype1]" not in done.stdout


def add(x, y, out, n, block: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, block)
    tl.store(out + at, tl.load(x + at) + tl.load(y + at), mask=at < n)


def test_launches_of_compiled_kernels_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of interpreted ones, which a GPU has not."""

    def launch(kernel: Any) -> "Counter[tuple[Any, ...]]":
        with interpreter.launches() as launched:
            kernel[(1,)](*(torch.zeros(16) for _ in range(3)), 16, block=16)
        return launched

    ran = []
    for kind in (JITFunction, InterpretedFunction):
        monkeypatch.setattr(kind, "run", lambda kernel, *args, **kwargs: ran.append(kernel))
    kernels = JITFunction(add), InterpretedFunction(add, do_not_specialize=None)
    found = [launch(kernel) for kernel in kernels]
    assert ran == [*kernels]
    assert found[0] == found[1]
    assert found[0].total() == 1
