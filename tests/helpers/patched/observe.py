"""What a vLLM does, shimmed or patched: run in a process of its own.

The module imports no vLLM: each function first says which one its process shall have.
"""

import importlib
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.v1.attention.selector import AttentionSelectorConfig

WINDOW = 512
TOO_LONG = f"User-specified max_model_len ({4 * WINDOW}) is greater than the derived"
CPU_PATH = "vllm.v1.attention.backends.cpu_attn.CPUAttentionBackend"
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "float32",
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 2,
    "vocab_size": 64,
    "max_position_embeddings": WINDOW,
    "rope_theta": 10000.0,
}


def use_vllm(overlay: Path | None, *paths: Path, plugins: str = "") -> None:
    """Choose which vLLM this process, and those it starts, will import."""
    assert "vllm" not in sys.modules
    first = [str(path) for path in (overlay, *paths) if path]
    sys.path[:0] = first
    os.environ["PYTHONPATH"] = os.pathsep.join(first)
    # EngineArgs loads plugins, and the tests want to say when.
    os.environ["VLLM_PLUGINS"] = plugins


def error_of(function: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """The error that a call raises, or what it returns."""
    try:
        return f"no error: {function(*args, **kwargs)}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _selector_config(**changes: Any) -> "AttentionSelectorConfig":
    import torch
    from vllm.v1.attention.selector import AttentionSelectorConfig

    usual = {"head_size": 64, "dtype": torch.float32, "kv_cache_dtype": "auto"}
    return AttentionSelectorConfig(**{"block_size": 128, **usual, **changes})


def select(backend: Any, **changes: Any) -> str:
    from vllm.platforms.cpu import CpuPlatform

    return CpuPlatform.get_attn_backend_cls(backend, _selector_config(**changes))


def _engine_args(model: Path, max_model_len: int | None, **args: Any) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(
        model=str(model), skip_tokenizer_init=True, max_model_len=max_model_len, **args
    )


def engine_config(model: Path, max_model_len: int | None, **args: Any) -> Any:
    return _engine_args(model, max_model_len, **args).create_engine_config()


def create_model(vllm_config: Any) -> Any:
    from vllm.config import set_current_vllm_config
    from vllm.distributed import (
        init_distributed_environment,
        initialize_model_parallel,
        model_parallel_is_initialized,
    )
    from vllm.model_executor.model_loader import get_model_loader

    with set_current_vllm_config(vllm_config):
        if not model_parallel_is_initialized():
            rendezvous = f"{vllm_config.model_config.model}/rendezvous-{os.getpid()}"
            init_distributed_environment(1, 0, f"file://{rendezvous}", 0, "gloo")
            initialize_model_parallel()
        loader = get_model_loader(vllm_config.load_config)
        return loader.create_model(
            vllm_config=vllm_config, model_config=vllm_config.model_config
        )


def settled(vllm_config: Any) -> dict[str, Any]:
    model_config = vllm_config.model_config
    return {
        "max_model_len": model_config.max_model_len,
        "original_max_model_len": model_config.original_max_model_len,
        "additional_config": vllm_config.additional_config,
    }


def _observe_upstream(model: Path) -> dict[str, Any]:
    """What vLLM does as long as nobody selects a backend of a plugin."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    # The last two are selected, and are for another device, and without a class.
    backends = [None, *map(AttentionBackendEnum.__getitem__, ("FLASH_ATTN", "TORCH_SDPA"))]
    built_in = [member for member in AttentionBackendEnum if member.name != "DCA"]
    vllm_config = engine_config(model, None)
    created = create_model(vllm_config)
    return {
        "selected": {
            f"{backend} {changes}": error_of(select, backend, **changes)
            for backend in backends
            for changes in ({}, {"use_mla": True}, {"use_sparse": True})
        },
        "pickled": [pickle.dumps(member) for member in built_in],
        "unpickled": [
            member.name
            for member in built_in
            if pickle.loads(pickle.dumps(member)) is not member
        ],
        "settled": [
            settled(engine_config(model, length, **args))
            for length in (None, -1, WINDOW // 2)
            for args in ({}, {"attention_backend": "FLASH_ATTN"})
        ],
        "hash": vllm_config.compute_hash(),
        "too long": error_of(engine_config, model, 4 * WINDOW),
        "too long, other backend": error_of(
            engine_config, model, 4 * WINDOW, attention_backend="FLASH_ATTN"
        ),
        "modules": [(name, str(module)) for name, module in created.named_modules()],
        "buffers": [(name, buffer.sum().item()) for name, buffer in created.named_buffers()],
    }


def _observe_dca(model: Path) -> dict[str, Any]:
    """What each shim, or its patch, is for."""
    import torch
    from vllm.config import AttentionConfig
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from vllm_dca.engine.backend import DcaBackend

    prepared = []
    prepare_model = DcaBackend.prepare_model

    def record(module: Any, vllm_config: Any) -> None:
        prepared.append(module)
        prepare_model(module, vllm_config)

    DcaBackend.prepare_model = record
    engine_args = _engine_args(model, 4 * WINDOW, attention_backend="dca")
    vllm_config = engine_args.create_engine_config()
    created = create_model(vllm_config)
    layers = [layer.self_attn for layer in created.model.layers]

    dca = AttentionBackendEnum["DCA"]
    user_config = {"dca": {"chunk_size": 256, "local_size": 128}}
    args = {"attention_backend": "dca", "additional_config": user_config}
    return {
        "pickle": pickle.dumps(AttentionConfig(backend="dca")),
        "selected": select(dca),
        "invalid": {
            key: error_of(select, dca, **{key: value})
            for key, value in {
                "use_mla": True,
                "use_sparse": True,
                "dtype": torch.float64,
                "kv_cache_dtype": "fp8",
            }.items()
        },
        "settled": {
            "flag": settled(vllm_config),
            "flag again": settled(engine_args.create_engine_config()),
            "config": settled(
                engine_config(model, 4 * WINDOW, attention_config={"backend": "dca"})
            ),
            "short": settled(engine_config(model, WINDOW // 2, attention_backend="dca")),
            "derived": settled(engine_config(model, None, attention_backend="dca")),
            "fitted": settled(engine_config(model, -1, attention_backend="dca")),
            "sizes": settled(engine_config(model, 4 * WINDOW, **args)),
        },
        "user's config": user_config,
        "refused": error_of(
            engine_config,
            model,
            None,
            attention_backend="dca",
            additional_config={"dca": {"chunk_sise": 384}},
        ),
        "refused kind": error_of(
            engine_config,
            model,
            4 * WINDOW,
            attention_config={"backend_per_kind": {"full_attention": "dca"}},
        ),
        "refused drafter": error_of(
            engine_config,
            model,
            None,
            speculative_config={
                "method": "ngram",
                "num_speculative_tokens": 1,
                "attention_backend": "dca",
            },
        ),
        "prepared": [module is created for module in prepared],
        "rotations": [type(layer.attn.impl.prepared.rotation).__name__ for layer in layers],
        "tables": [len(layer.rotary_emb.cos_sin_cache) for layer in layers],
    }


def observe(overlay: Path | None, model: Path) -> dict[str, Any]:
    use_vllm(overlay)
    before = _observe_upstream(model)

    from vllm_dca.engine import shims

    applied = shims.apply()
    return {
        "vllm": importlib.import_module("vllm").__file__,
        "docstrings": {shim.name: shim.apply.__doc__ for shim in shims.SHIMS},
        "applied": applied,
        "applied again": shims.apply(),
        "before": before,
        "after": _observe_upstream(model),
        "dca": _observe_dca(model),
    }


def receive(overlay: Path | None, pickled: bytes) -> dict[str, Any]:
    use_vllm(overlay, plugins="dca")
    config = pickle.loads(pickled)

    from vllm.plugins import load_general_plugins
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    received = {"name": config.backend.name, "path": config.backend.get_path()}
    load_general_plugins()
    return {
        **received,
        "same": AttentionBackendEnum["DCA"] is config.backend,
        "selected": select(config.backend),
    }
