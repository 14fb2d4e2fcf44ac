"""The scripts for a GPU, as far as a machine without one can run them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from scripts.bench import cases, clock, kernels, machine_code, sparse_kernels
from scripts.bench.cases import Case
from scripts.bench.layer import Layer
from tests.helpers import interpreter
from vllm_dca.cuda import sparse_attend, sparse_prefill
from vllm_dca.cuda.paged_pass import attention

ROOT = Path(__file__).parents[2]
interpreter.repair()


@pytest.mark.parametrize("step", ["decode", "prefill"])
def test_benchmark_checks_its_answers(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """DCA's, and those of the flash-attention that stands beside it."""
    bench = kernels.Bench(16)
    assert bench.flash is None
    case = Case(cases.TINY, 2, 90, 1) if step == "decode" else Case(cases.TINY, 1, 90, 10)
    measure = getattr(bench, f"{step}_row")
    row = measure(case)
    assert row["launches"] == {"decode": 2, "prefill": 1}[step]
    # Its queries and answers too; partial results, or turned queries, and a plan.
    assert case.cache_bytes < row["floor_bytes"] < row["moved_bytes"]
    assert row["flash_ms"] == row["over_flash"] == "n/a"

    bench.can["flash_attn"], bench.flash = attention, "flash_attn"
    row = kernels.with_floors(
        measure(case),
        case,
        {"copy_bytes_per_second": 1e9, "product_operations_per_second": 1e12},
    )
    assert row["over_flash"] == row["dca_ms"]["median"] / row["flash_ms"]["median"]
    # Keys and values of 32 entries, 2 bytes, 2 heads, once, at a byte a nanosecond.
    assert row["floor_copy_ms"] == pytest.approx(case.batch * case.context * 256e-6)
    assert kernels.printed(row).count("n/a") == 0

    def wrong(*args: Any, **kwargs: Any) -> Any:
        lse = attention(*args, **kwargs)
        args[3].mul_(1.1)
        return lse

    bench.can["flash_attn"] = wrong
    with pytest.raises(AssertionError, match=r"tiny, .* tokens"):
        measure(case)
    bench.flash = None
    check = Layer.check

    def spoilt(layer: Layer) -> None:
        layer.output.mul_(1.1)
        check(layer)

    monkeypatch.setattr(Layer, "check", spoilt)
    with pytest.raises(AssertionError, match=r"tiny, .* tokens"):
        measure(case)


def test_floors_count_what_causal_queries_see() -> None:
    case = Case(cases.TINY, 3, 50, 20)
    seen = sum(position + 1 for position in range(30, 50))
    assert case.operations == 3 * seen * 4 * 6 * 32
    whole = [*cases.decode(False), *cases.prefill(False)]
    assert {case.context for case in whole} == {k << 10 for k in (8, 32, 128, 512, 1024)}
    assert all(case.cache_bytes <= clock.memory() for case in cases.decode(False))


def test_sparse_prefill_is_checked_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its operations are those of the lines that are marked; a wrong answer is not timed."""
    [case] = cases.sparse(True)
    rule = sparse_kernels.rules(True, case.shape.heads)["coverage"]
    bench = sparse_kernels.Bench(case, rule, 16)
    bench.all()
    found = bench.taken()
    pairs = 0
    for index, segment in enumerate(bench.segments):
        lines = bench.buffers.lines_of(bench.round, index)
        i, j = torch.arange(segment.begin, segment.end)[:, None], torch.arange(segment.end)
        tile_end = i // 64 * 64 + 64
        taken = lines.verticals[:, j] | lines.distances[:, (tile_end - j).clamp(min=0)]
        pairs += int((taken & (j < tile_end)).sum())
    assert bench.worked_out(found)["operations"]["attention"] == 4 * 32 * pairs
    assert 0 < found.share < 1

    attend = sparse_attend.attend

    def wrong(*args: Any, **kwargs: Any) -> None:
        attend(*args, **kwargs)
        args[2].mul_(1.1)

    monkeypatch.setattr(sparse_prefill, "attend", wrong)
    with pytest.raises(AssertionError, match=r"tiny, .* tokens"):
        bench.check()


MACHINE_CODE = """
        /*0000*/                   S2R R0, SR_CTAID.X ;      /* 0x0000000000007919 */
        /*0010*/                   IADD3 R1, R1, 0x1, RZ ;
        /*0018*/                   HMMA.16816.F32 R8, R4, R6, R8 ;
        /*001c*/                   ISETP.NE.AND P0, PT, R1, 0x9, PT ;
        /*0020*/                   BRA.U UP0, 0xb0 ;
        /*0030*/               @P0 BRA 0x10 ;
        /*0040*/                   LDSM.16.M88.4 R4, [R2] ;
        /*0048*/                   BRA.DIV ~URZ, 0xd0 ;
        /*0050*/              @!P1 BRA 0x80 ;
        /*0060*/                   HMMA.16816.F32 R8, R4, R6, R8 ;
        /*0070*/                   BRA 0xb0 ;
        /*0080*/                   HMMA.16816.F32 R8, R4, R6, R8 ;
        /*0088*/                   HMMA.16816.F32 R8, R4, R6, R8 ;
        /*0090*/               @P2 BRA 0x40 ;
        /*00a0*/              @!P3 BRA 0x10 ;
        /*00b0*/                   EXIT ;
        /*00c0*/                   BRA 0xc0;
        /*00d0*/                   HMMA.16816.F32 R8, R4, R6, R8 ;
        /*00e0*/                   BRA 0x50 ;
"""


def test_the_loop_that_multiplies_is_found() -> None:
    """Not one with fewer products, not the one around both, what leaves it, nor what only
    threads run that have parted."""
    assert machine_code.loop_of(MACHINE_CODE) == machine_code.Loop(6, 2)
    with pytest.raises(ValueError, match="no loop multiplies"):
        machine_code.loop_of(MACHINE_CODE.replace("HMMA", "FMUL"))


# What 8.0 runs must fit 8.6, 8.9 and 12.0 too, where a block may have 99 KiB.
SHARED = {80: 99 << 10, 90: 227 << 10}


def compiled_and_fit(folder: Path, *options: str) -> list[dict[str, Any]]:
    """Rows of kernels that were compiled anew."""
    output = folder / "kernels.json"
    subprocess.run(
        [sys.executable, "-m", "scripts.bench.compile_kernels", *options, "--output", output],
        check=True,
        cwd=ROOT,
        env={**os.environ, "TRITON_CACHE_DIR": str(folder / "cache")},
    )
    kernels: list[dict[str, Any]] = json.loads(output.read_text())["kernels"]
    assert {kernel["capability"] for kernel in kernels} == set(SHARED)
    for kernel in kernels:
        assert not kernel["spilled_bytes"]
        assert kernel["shared_bytes"] <= SHARED[kernel["capability"]]
        # What latency and bandwidth ask for, in programs that run beside one another. Without
        # tensor cores heads over 256 are no matter of bandwidth.
        if kernel["kernel"].startswith("decode") and kernel["shape"] != "heads of 320":
            in_flight = kernel["bytes_in_flight"] * kernel["programs_per_multiprocessor"]
            assert in_flight >= 32 << 10
    return kernels


def test_kernels_compile_and_fit(tmp_path: Path) -> None:
    kernels = compiled_and_fit(tmp_path, "--quick")
    assert {kernel["shape"] for kernel in kernels} == {
        "Llama-3-8B",
        "MQA",
        "Gemma-2",
        "gpt-oss",
        "Gemma-4",
        "heads of 320",
    }
    names = {kernel["kernel"].partition("_")[0] for kernel in kernels}
    assert names == {
        *("turn", "merge", "attention", "prefill", "plan", "decode", "reduce"),
        *("normalise", "weigh", "choose", "list", "attend"),
    }


@pytest.mark.nightly
def test_kernels_of_every_dtype_compile_and_fit(tmp_path: Path) -> None:
    """Of two shapes, on either card with either FP8 cache."""
    shapes = ("--shapes", "Llama-3-8B", "MQA")
    kernels = compiled_and_fit(tmp_path, *shapes, "--capabilities", *map(str, SHARED))
    assert {kernel["dtype"] for kernel in kernels} == {"bfloat16", "float16", "float32"}
    caches = {(each["capability"], each["kv_cache"]) for each in kernels}
    assert {(80, "float8_e5m2"), (90, "float8_e5m2"), (90, "float8_e4m3fn")} <= caches
