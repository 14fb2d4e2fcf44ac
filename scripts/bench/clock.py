"""Times of a layer's launches on a GPU, and the floors that stand beside them.

Without a GPU this is a rehearsal: everything is called with the same arguments, once, in
Triton's interpreter, and what comes out is no time of a card. Import it before Triton.
"""

import argparse
import inspect
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

REHEARSAL = not torch.cuda.is_available()
if REHEARSAL:
    os.environ["TRITON_INTERPRET"] = "1"
DEVICE = torch.device("cpu" if REHEARSAL else "cuda")
QUANTILES = {"low": 0.2, "median": 0.5, "high": 0.8}
GIB = 1 << 30


def arguments(description: str) -> argparse.Namespace:
    """A benchmark's: `dry_run`, without which a GPU is needed, and `output`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--dry-run", action="store_true", help="small, and without a GPU")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    assert given.dry_run or not REHEARSAL, "needs a GPU; --dry-run does not"
    return given


def prepare() -> dict[str, Any]:
    """The facts of the device, floors included; the interpreter gets a card's arithmetic."""
    if REHEARSAL:
        from tests.helpers import interpreter

        interpreter.repair()
    return {
        "device": "none: a rehearsal" if REHEARSAL else torch.cuda.get_device_name(),
        "copy_bytes_per_second": copy_bandwidth(),
        "product_operations_per_second": product_rate(),
    }


def multiprocessors() -> int:
    return 1 if REHEARSAL else torch.cuda.get_device_properties(0).multi_processor_count


def memory() -> int:
    """Bytes that a benchmark may fill."""
    total = GIB if REHEARSAL else torch.cuda.get_device_properties(0).total_memory
    return int(0.4 * total)


def capability() -> tuple[int, int]:
    return (9, 0) if REHEARSAL else torch.cuda.get_device_capability()


def _call(bench: str, run: Callable[[], Any]) -> dict[str, float]:
    from triton import testing

    function = getattr(testing, bench)
    arguments = inspect.signature(function).bind(run, quantiles=[*QUANTILES.values()])
    if REHEARSAL:
        start = time.perf_counter()
        run()
        return dict.fromkeys(QUANTILES, (time.perf_counter() - start) * 1e3)
    return dict(zip(QUANTILES, function(*arguments.args, **arguments.kwargs), strict=True))


def replayed(run: Callable[[], Any]) -> dict[str, float]:
    """Milliseconds of `run` in a captured CUDA graph: without the host's launches."""
    return _call("do_bench_cudagraph", run)


def launched(run: Callable[[], Any]) -> dict[str, float]:
    """Milliseconds of `run` from the host; caches are cleared between runs."""
    return _call("do_bench", run)


def launches(run: Callable[[], Any]) -> int:
    """Kernels and copies of one `run`."""
    if REHEARSAL:
        from tests.helpers import interpreter

        with interpreter.launches() as counted:
            run()
        return sum(counted.values())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    device = torch.autograd.DeviceType.CUDA  # not the host's calls
    return sum(event.device_type == device for event in profile.events())


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a device-to-device copy."""
    source = torch.empty(1 << 16 if REHEARSAL else GIB, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    milliseconds = launched(lambda: target.copy_(source))["median"]
    return 2 * source.numel() / (milliseconds * 1e-3)


def product_rate() -> float:
    """Operations a second of a large matrix product."""
    side = 64 if REHEARSAL else 8192
    a, b = (torch.randn(side, side, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    return 2 * side**3 / (launched(lambda: a @ b)["median"] * 1e-3)
