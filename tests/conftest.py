"""Engines, logs and text that test modules share."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.helpers import log
from tests.helpers.children import Children

# pytest-xdist's workers share the cores: what waits in a loop for its threads must not wait for
# those of another worker.
_cores = sorted(os.sched_getaffinity(0))
_worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
_own = _cores[_worker :: int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))] or _cores
torch.set_num_threads(len(_own))
# vLLM's own knobs for the CPU, read when an engine starts: every core that we may use, and a
# cache that is small but holds the longest test prompt.
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, _own)))
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
# Without a GPU, Triton's kernels run in its interpreter, which must be known before Triton is
# imported. Engines on the CPU have no use for Triton.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    # What only hardware can show.
    collect_ignore = ["cuda/test_gpu.py"]
else:
    # What rehearses a GPU.
    rehearsals = ("cuda_graphs", "cuda_path", "cuda_sparse", "model_runner_v2")
    collect_ignore = [f"engine/test_{name}.py" for name in rehearsals]

DEMO_MODEL = Path(
    os.environ.get("DCA_DEMO_MODEL", Path(__file__).parents[1] / ".cache" / "demo-model")
)
# Small chunks put many borders into short texts.
DEMO_SIZES = {"chunk_size": 1024, "local_size": 256}


# Files of minutes, which start first, so that no worker ends with one while the other waits.
LONG = (
    "test_shims",
    "test_patches",
    "test_parallel",
    "test_ray_batch",
    "test_gpu_command",
    "test_gpu_benchmarks",
    "test_model_runner_v2",
    "test_package",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem not in LONG)


def pytest_unconfigure() -> None:
    """What `inprocess.engine` hid: else libraries complain at the end that it was left."""
    gc.unfreeze()


@pytest.fixture(scope="session")
def prose() -> list[int]:
    """The demo text in the demo model's tokens."""
    from transformers import AutoTokenizer

    from scripts.common.corpus import load

    return AutoTokenizer.from_pretrained(DEMO_MODEL)(load())["input_ids"]


@pytest.fixture(scope="session")
def children() -> Iterator[Children]:
    """Processes for tests of all modules, since each takes a while to import vLLM."""
    with Children() as children:
        yield children


@pytest.fixture
def dca_log() -> Iterator[list[str]]:
    """What the plugin logs in this process."""
    with log.collected() as messages:
        yield messages


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine has none: there is no compiled kernel for its CPU."""
    from vllm_dca.cpu import compiled
    from vllm_dca.cpu.build import BuildError

    def library() -> None:
        raise BuildError("no C++ compiler")

    monkeypatch.setattr(compiled, "library", library)
