"""Engines of tiny checkpoints inside the test's own process: they start in seconds."""

import contextlib
import gc
import multiprocessing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

# On a GPU decodes run in CUDA graphs, as users' do; torch.compile would take long a model.
EXECUTION: dict[str, Any] = {"enforce_eager": True}
if torch.cuda.is_available():
    EXECUTION = {"compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}}


def inspect_models_here(patch: pytest.MonkeyPatch) -> None:
    """vLLM then asks no process of its own, for seconds each, what a model can do.

    It does so to keep CUDA out of its own process; a test imports the model in any case.
    """
    from vllm.model_executor.models import registry

    patch.setattr(registry, "_run_in_subprocess", lambda inspect: inspect())


@pytest.fixture(scope="package", autouse=True)
def models_are_inspected_here() -> Iterator[None]:
    """For configs that a test makes without an engine, where a conftest.py imports this."""
    with pytest.MonkeyPatch.context() as patch:
        inspect_models_here(patch)
        yield


def settle(model: Path, **options: Any) -> Any:
    """The configuration step of a start, which `vllm serve` and `LLM` share."""
    from vllm.engine.arg_utils import EngineArgs

    defaults = {
        "attention_backend": "dca",
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "block_size": 16,
    }
    return EngineArgs(str(model), **{**defaults, **options}).create_engine_config()


def collect_only_what_comes(patch: pytest.MonkeyPatch) -> None:
    """Hide from the garbage collector what there is by now, mostly imported modules.

    vLLM collects a dozen times for each engine, and going through all of them takes longer than
    the rest of a test. Engines stay in sight, which vLLM hides itself: their weights must go.
    """
    gc.collect()
    gc.freeze()
    for name in ("freeze", "unfreeze"):
        patch.setattr(gc, name, lambda: None)


@contextlib.contextmanager
def engine(model: Path, **options: Any) -> Iterator[Any]:
    """An LLM with DCA, gone at the end; prefills are cut at odd places."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    defaults = {
        "attention_backend": "dca",
        "dtype": "float32",
        "skip_tokenizer_init": True,
        "max_model_len": 1024,
        "block_size": 16,
        "max_num_batched_tokens": 100,
        "num_gpu_blocks_override": 200,
        "disable_log_stats": False,
        **EXECUTION,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        inspect_models_here(patch)
        collect_only_what_comes(patch)
        try:
            llm = LLM(str(model), **{**defaults, **options})
            try:
                yield llm
            finally:
                # Now, not when the last reference goes: a failed test's traceback has one.
                llm.llm_engine.engine_core.shutdown()
                del llm
        finally:
            cleanup_dist_env_and_memory()


def runner_of(llm: Any) -> Any:
    """Its model runner."""
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker
    return worker.model_runner


def in_a_child(function: Callable[..., None], *args: Any) -> None:
    """Run it in a process of its own, errors and all.

    For what leaves traces in a process that later tests would meet, such as engines that import
    numba (speculation by ngram): with numba there, vLLM 0.32 cannot start another; it searches
    all modules, and llvmlite's object to that.
    """
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        pool.apply(function, args)
