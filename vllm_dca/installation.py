"""Position remap: a periodic rotary table for the layers that DCA attends, and no others."""

import copy

import torch
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.rotary_embedding import (
    LinearScalingRotaryEmbedding,
    Llama3RotaryEmbedding,
    RotaryEmbedding,
    YaRNScalingRotaryEmbedding,
)
from vllm.platforms import current_platform

from vllm_dca.config import DcaSettings
from vllm_dca.devices import Device, current_device
from vllm_dca.providers import Needs
from vllm_dca.rotary import QueryRotation, periodic_table, unit_table
from vllm_dca.startup import cache_dtype_of, settings_of

# vLLM's logger is set up for its own package only.
logger = init_logger("vllm.plugins.dca")

# Exactly these: a subclass may give its table another meaning.
_GROWABLE = (RotaryEmbedding, Llama3RotaryEmbedding)
_SUPPORTED = (
    *_GROWABLE,
    LinearScalingRotaryEmbedding,
    YaRNScalingRotaryEmbedding,
)


def install(model: torch.nn.Module, vllm_config: VllmConfig) -> None:
    """Prepare every attention layer of a freshly built model.

    vLLM shares rotary modules between layers, some of which DCA may not attend, so a layer
    gets a copy with the periodic table; layers that shared one module share the copy.

    Raises:
        NotImplementedError: a layer whose positions cannot be remapped, named.
    """
    from vllm_dca.backend import DcaBackend

    settings = settings_of(vllm_config)
    devices: dict[Needs, Device] = {}
    copies: dict[int, tuple[RotaryEmbedding, QueryRotation]] = {}
    installed = []
    for name, layer in model.named_modules():
        if not isinstance(layer, Attention):
            continue
        if layer.attn_backend is not DcaBackend:
            raise _refusal(name, f"its attention would be {layer.attn_backend.__name__}")
        parent = model.get_submodule(name.rpartition(".")[0])
        rotary_name, rotary = _find_rotary(name, parent)
        if id(rotary) not in copies:
            copies[id(rotary)] = _remap(
                rotary, settings, vllm_config.model_config.max_model_len
            )
        periodic, layer.impl.rotation = copies[id(rotary)]
        setattr(parent, rotary_name, periodic)
        needs = _needs(layer, vllm_config)
        if needs not in devices:
            devices[needs] = current_device(needs, settings.prefill_provider)
        layer.impl.device = devices[needs]
        installed.append(name)
    if installed:
        logger.info_once(
            "DCA attends %d layers: %s .. %s; prefill by %s",
            len(installed),
            installed[0],
            installed[-1],
            ", ".join(sorted({device.provider for device in devices.values()})),
        )


def _needs(layer: Attention, vllm_config: VllmConfig) -> Needs:
    dtype = vllm_config.model_config.dtype
    capability = current_platform.get_device_capability()
    return Needs(
        head_size=layer.head_size,
        dtype=dtype,
        cache_dtype=cache_dtype_of(layer.kv_cache_dtype, dtype),
        block_size=vllm_config.cache_config.block_size,
        capability=(0, 0) if capability is None else tuple(capability),
    )


def _refusal(layer_name: str, reason: str) -> NotImplementedError:
    return NotImplementedError(
        f"--attention-backend dca cannot serve this model: layer {layer_name}: {reason}. "
        "DCA needs decoder layers that hold a rotary embedding of type "
        f"{', '.join(cls.__name__ for cls in _SUPPORTED)} beside their attention. Use another "
        "attention backend."
    )


def _find_rotary(layer_name: str, parent: torch.nn.Module) -> tuple[str, RotaryEmbedding]:
    candidates = {
        name: child
        for name, child in parent.named_children()
        if hasattr(child, "cos_sin_cache") or "Rotary" in type(child).__name__
    }
    if not candidates:
        raise _refusal(layer_name, "it has no rotary embedding")
    if len(candidates) > 1:
        raise _refusal(layer_name, f"it has several rotary embeddings, {', '.join(candidates)}")
    name, rotary = candidates.popitem()
    if type(rotary) not in _SUPPORTED:
        raise _refusal(layer_name, f"its rotary embedding is a {type(rotary).__name__}")
    return name, rotary


def _remap(
    rotary: RotaryEmbedding, settings: DcaSettings, max_model_len: int
) -> tuple[RotaryEmbedding, QueryRotation]:
    """A copy of the module with a periodic table, and the rotation that goes with it."""
    # deepcopy also rebinds CustomOp's bound forward method; copy.copy would leave the copy
    # calling the original, with the original's table.
    periodic = copy.deepcopy(rotary)
    table = rotary.cos_sin_cache
    if settings.chunk_size >= len(table) and type(rotary) in _GROWABLE:
        periodic.max_position_embeddings = settings.chunk_size + 1
        table = periodic._compute_cos_sin_cache().to(table.dtype)
    exact = periodic._compute_cos_sin_cache()  # fp32, where the module's own may be bf16
    rotation = QueryRotation(unit_table(exact, settings.chunk_size), rotary.is_neox_style)
    periodic.cos_sin_cache = periodic_table(table, settings.geometry.chunk_len, max_model_len)
    periodic.max_position_embeddings = max_model_len
    return periodic, rotation
