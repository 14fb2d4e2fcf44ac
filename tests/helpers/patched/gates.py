"""What `shims.apply` says to a vLLM that it was not written for."""

import importlib
import logging
from typing import Any

import pytest

from tests.helpers.patched.observe import error_of, use_vllm


def observe_gates() -> dict[str, dict[str, Any]]:
    """Let every check of `apply` fail once, then none."""
    use_vllm(None)
    import copyreg

    import vllm
    from vllm.config import AttentionConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from vllm_dca import plugin
    from vllm_dca.engine import shims

    targets = {
        "pickle_by_name": (AttentionBackendEnum, "register"),
        "select_on_cpu": (CpuPlatform, "get_attn_backend_cls"),
        "extend_context": (EngineArgs, "create_model_config"),
        "verify_config": (EngineArgs, "create_engine_config"),
        "prepare_model": (BaseModelLoader, "create_model"),
    }
    originals = [vars(owner)[name] for owner, name in targets.values()]

    def changed(something: Any, else_: Any) -> None:
        raise AssertionError

    logged: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = logged.append
    logging.getLogger("vllm").addHandler(handler)

    def attempt() -> dict[str, Any]:
        importlib.reload(shims)  # it reads the signatures when it is imported
        present = [vars(owner)[name] for owner, name in targets.values()]
        logged.clear()
        error = error_of(shims.apply)
        plugin.register()
        return {
            "error": error,
            "logged": [f"{r.levelname} {r.name} {r.getMessage()}" for r in logged],
            "shimmed": [
                shim
                for shim, (owner, name), was in zip(
                    targets, targets.values(), present, strict=True
                )
                if vars(owner)[name] is not was
            ],
            "pickles": AttentionBackendEnum in copyreg.dispatch_table,
            "selected": error_of(AttentionConfig, backend="dca"),
        }

    attempts = {}
    for version in ("0.31.0", "0.34.0", "1.32.0"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(vllm, "__version__", version)
            attempts[version] = attempt()
    for shim, (owner, name) in targets.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, name, staticmethod(changed))
            attempts[shim] = attempt()
    assert [vars(owner)[name] for owner, name in targets.values()] == originals
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vllm, "__version__", "0.32.9.post1+cpu")
        attempts["none"] = attempt()
    return attempts
