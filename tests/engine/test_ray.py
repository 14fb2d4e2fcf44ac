"""DCA on Ray: a config and whole engines across nodes.

vLLM's Ray executor refuses the CPU for one reason, that its platform names no device for Ray to
count. Here it names one, and the executor is vLLM's own.
"""

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
import ray
import torch
from ray.cluster_utils import Cluster

from tests.helpers import checkpoints
from tests.helpers.answers import assert_close, generate, of_answer, of_prompt
from tests.helpers.checkpoints import SIZES
from tests.helpers.inprocess import settle
from tests.helpers.on_ray import OPTIONS, write_model

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


def let_ray_place_ranks() -> None:
    """Runs in each of Ray's workers when it starts.

    vLLM finds a rank's device in Ray under the key of its platform, and the CPU has none.
    Under this one it finds what the nodes below claim to have.
    """
    from vllm.platforms.cpu import CpuPlatform

    CpuPlatform.ray_device_key = "GPU"
    sys.plugin_before_config = "vllm_dca" in sys.modules


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two nodes of one core each, on this machine."""
    from vllm.platforms.cpu import CpuPlatform

    monkeypatch.setattr(CpuPlatform, "ray_device_key", "GPU")
    node = {"num_cpus": 1, "num_gpus": 1}  # Ray takes one's word
    cluster = Cluster(initialize_head=True, head_node_args=node)
    try:
        cluster.add_node(**node)
        cluster.wait_for_nodes()
        ray.init(
            address=cluster.address,
            runtime_env={
                "worker_process_setup_hook": let_ray_place_ranks,
                # They import by name what they are sent, and the vLLM that sends it.
                "env_vars": {
                    "PYTHONPATH": os.pathsep.join(sys.path),
                    "VLLM_CPU_KVCACHE_SPACE": "1",
                },
            },
        )
        yield
    finally:
        ray.shutdown()
        cluster.shutdown()


def observe(config: Any) -> dict[str, Any]:
    """What a config that came from another process means in this one."""
    from vllm_dca.engine.settings import settings_of

    backend = config.attention_config.backend
    return {
        "backend": backend.name,
        "class": backend.get_class().__qualname__,
        "settings": settings_of(config).to_dict(),
    }


def observe_rank(worker: Any) -> dict[str, Any]:
    from vllm.model_executor.layers.attention import Attention

    layers = worker.worker.get_model().modules()
    return {
        **observe(worker.vllm_config),
        "layers": [
            (layer.attn_backend.__qualname__, layer.num_heads, layer.impl.prepared is not None)
            for layer in layers
            if isinstance(layer, Attention)
        ],
        "node": ray.get_runtime_context().get_node_id(),
        "plugin before config": sys.plugin_before_config,
    }


def test_an_engine_over_two_nodes_agrees_with_the_reference(
    cluster: None, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    from vllm_dca.reference.model import prompt_logprobs

    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    prompt = checkpoints.tokens(300)
    llm = LLM(
        str(model),
        attention_backend="dca",
        skip_tokenizer_init=True,
        max_model_len=1024,
        tensor_parallel_size=2,
        distributed_executor_backend="ray",
        **OPTIONS,
    )
    core = llm.llm_engine.engine_core
    try:
        executor = core.engine_core.model_executor
        found = executor.collective_rpc(observe_rank)
        here = observe(llm.llm_engine.vllm_config)
        [output] = generate(llm, [prompt], max_tokens=5, prompt_logprobs=0)
    finally:
        core.shutdown()
        cleanup_dist_env_and_memory()

    assert here["class"] == "DcaBackend"
    assert here["settings"].items() >= SIZES.items()
    assert len({rank.pop("node") for rank in found}) == 2
    assert [rank.pop("plugin before config") for rank in found] == [False, False]
    half = checkpoints.SHAPE["num_attention_heads"] // 2
    assert found == [here | {"layers": [("DcaBackend", half, True)] * 2}] * 2

    tokens, logprobs = of_answer(output)
    expected = prompt_logprobs(model, prompt + tokens, **SIZES)
    answered = torch.cat([of_prompt(output), logprobs]).double()
    assert_close(answered, expected)


FRESH = """
import pickle, sys
config = pickle.load(sys.stdin.buffer)
from tests.engine.test_ray import observe
print(observe(config))
"""


@pytest.mark.parametrize(
    "way",
    # Into fresh processes the engine above sends one each time.
    [
        "fork",
        *(pytest.param(way, marks=pytest.mark.nightly) for way in ("spawn", "cloudpickle")),
    ],
)
def test_a_config_means_the_same_in_another_process(way: str, model: Path) -> None:
    """The ways of vLLM's executors, with the whole config.

    Its multiprocess executor forks or spawns its ranks, also on many nodes: each node's `vllm
    serve` makes the config anew from the same arguments, and none crosses the network. Ray's
    executors and data-parallel engines send it to other nodes with their own cloudpickle.
    """
    config = settle(model, max_model_len=1024, **OPTIONS)
    here = observe(config)
    assert here["class"] == "DcaBackend"
    assert here["settings"].items() >= SIZES.items()
    if way == "cloudpickle":
        command = [sys.executable, "-c", FRESH]
        found = subprocess.check_output(command, input=cloudpickle.dumps(config), cwd=ROOT)
        assert found.decode().splitlines()[-1] == repr(here)
    else:
        with multiprocessing.get_context(way).Pool(1) as pool:
            assert pool.apply(observe, (config,)) == here
