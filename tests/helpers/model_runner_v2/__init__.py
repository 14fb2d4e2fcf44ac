"""vLLM's Model Runner V2, CUDA's default, on a CPU, its kernels in Triton's interpreter.

V2 serves the CPU (`vllm/v1/worker/cpu/model_runner.py`) where vLLM finds a backend of Triton
for it. The one in this folder compiles nothing, and the interpreter wants nothing compiled.
Triton and vLLM look for backends and plugins by entry points, when they are imported: so V2
needs a process with this folder on its path, and finds both in the workers that it starts too.
"""

import contextlib
import functools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FOLDER = str(Path(__file__).parent)


def activate() -> None:
    """Make vLLM take V2 in this process and its children; before Triton is imported."""
    assert not {"triton", "vllm"} & set(sys.modules)
    sys.path.insert(0, FOLDER)
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
    # Piecewise graphs without torch.compile; read when vLLM is imported.
    os.environ["VLLM_USE_BREAKABLE_CUDAGRAPH"] = "1"


def register() -> None:
    """What vLLM loads as a plugin, in every process."""
    from tests.helpers import interpreter

    interpreter.patch_for_good()
    _schedule_asynchronously()


@functools.cache
def _schedule_asynchronously() -> None:
    """vLLM does on CUDA, and switches it off on the CPU, which has no use for it."""
    from vllm.platforms.cpu import CpuPlatform

    original = CpuPlatform.check_and_update_config.__func__

    def check_and_update_config(cls: type, vllm_config: Any) -> None:
        chosen = vllm_config.scheduler_config.async_scheduling
        original(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = chosen

    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)


@contextlib.contextmanager
def capturing(sizes: list[int]) -> Iterator[None]:
    """Engines capture graphs as on CUDA: full ones for decodes, piecewise ones for the rest.

    Args:
        sizes: of the batches to capture, in tokens.
    """
    from vllm.compilation import breakable_cudagraph
    from vllm.config import CUDAGraphMode
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.worker.cpu_worker import CPUWorker
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner
    from vllm.v1.worker.workspace import init_workspace_manager

    from tests.helpers import graphs
    from vllm_dca.cuda import device

    initialize, warm_up = GPUModelRunner.initialize_kv_cache, CPUWorker.compile_or_warm_up_model

    def with_graphs(self: Any, *args: Any, **kwargs: Any) -> None:
        # After a drafter is loaded, for which vLLM settles the configuration anew.
        compilation = self.compilation_config
        compilation.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
        compilation.cudagraph_capture_sizes = sizes
        compilation.max_cudagraph_capture_size = max(sizes)
        init_workspace_manager(self.device)
        initialize(self, *args, **kwargs)

    def and_capture(self: Any) -> Any:
        times = warm_up(self)
        self.model_runner.capture_model()
        return times

    with graphs.stand_in(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(GPUModelRunner, "initialize_kv_cache", with_graphs)
        patch.setattr(CPUWorker, "compile_or_warm_up_model", and_capture)
        patch.setattr(CpuPlatform, "graph_pool_handle", lambda self: (0, 0), raising=False)
        # Attention is called as Python, not as an operation that a graph would keep whole.
        patch.setattr(CpuPlatform, "opaque_attention_op", classmethod(lambda cls: False))
        for name in ("weak_ref_tensor", "weak_ref_tensors"):  # operators of CUDA's
            patch.setattr(breakable_cudagraph, name, lambda tensors: tensors)
        # Where it is used: this process may have imported it from its home before.
        patch.setattr(device, "write_kv", graphs.as_kernel(device.write_kv))
        yield
