"""What patched vLLM does for somebody else's backend, which no shim knows."""

import pickle
from pathlib import Path
from typing import Any

from tests.helpers.patched.observe import (
    CPU_PATH,
    WINDOW,
    create_model,
    engine_config,
    error_of,
    select,
    settled,
    use_vllm,
)

OTHER_BACKEND = """
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

class OtherBackend(CPUAttentionBackend):
    prepared = []

    @classmethod
    def extends_context(cls):
        return True

    @classmethod
    def verify_and_update_config(cls, vllm_config):
        vllm_config.additional_config = {"other": vllm_config.model_config.max_model_len}

    @classmethod
    def prepare_model(cls, model, vllm_config):
        cls.prepared.append(type(model).__name__)
"""


def observe_other(overlay: Path, model: Path, other: Path) -> dict[str, Any]:
    use_vllm(overlay, other)
    from other_backend import OtherBackend
    from vllm.config import AttentionConfig
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend("OTHER")(OtherBackend)
    vllm_config = engine_config(model, 4 * WINDOW, attention_backend="other")
    create_model(vllm_config)
    register_backend("PLAIN", CPU_PATH)  # one without any of the hooks
    plain = engine_config(model, WINDOW, attention_backend="plain")
    return {
        "pickle": pickle.dumps(AttentionConfig(backend="other")),
        "selected": select(AttentionBackendEnum["OTHER"]),
        "settled": settled(vllm_config),
        "prepared": OtherBackend.prepared,
        "plain": settled(plain),
        "plain model": type(create_model(plain)).__name__,
        "plain, too long": error_of(
            engine_config, model, 4 * WINDOW, attention_backend="plain"
        ),
    }


def receive_other(overlay: Path, pickled: bytes, other: Path) -> list[bool]:
    use_vllm(overlay, other)
    backend = pickle.loads(pickled).backend

    from other_backend import OtherBackend
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    restored = backend.get_class() is OtherBackend
    register_backend("OTHER")(OtherBackend)  # as its plugin would, loaded late
    again = error_of(AttentionBackendEnum.register, "OTHER", "")
    return [
        restored,
        backend.get_class() is OtherBackend,
        AttentionBackendEnum["OTHER"] is backend,
        again.startswith("ValueError: Backend OTHER already exists"),
    ]
