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
    gets a copy with the periodic table; layers that shared one module share the copy. Layers
    with a sliding window keep their attention and their positions, in a table that is long
    enough for them.

    Raises:
        NotImplementedError: a layer whose positions cannot be remapped, named.
    """
    from vllm_dca.backend import DcaBackend

    settings = settings_of(vllm_config)
    max_model_len = vllm_config.model_config.max_model_len
    devices: dict[Needs, Device] = {}
    remapped: dict[int, tuple[RotaryEmbedding, QueryRotation]] = {}
    lengthened: dict[int, RotaryEmbedding] = {}
    installed, kept = [], []
    for name, layer in model.named_modules():
        if not isinstance(layer, Attention):
            continue
        parent = model.get_submodule(name.rpartition(".")[0])
        rotary_name, rotary = _find_rotary(name, parent)
        if layer.attn_backend is not DcaBackend:
            if layer.sliding_window is None:
                raise _refusal(name, f"its attention would be {layer.attn_backend.__name__}")
            if id(rotary) not in lengthened:
                lengthened[id(rotary)] = _lengthen(name, rotary, max_model_len)
            setattr(parent, rotary_name, lengthened[id(rotary)])
            kept.append(name)
            continue
        if id(rotary) not in remapped:
            remapped[id(rotary)] = _remap(rotary, settings, max_model_len)
        periodic, layer.impl.rotation = remapped[id(rotary)]
        setattr(parent, rotary_name, periodic)
        needs = _needs(layer, vllm_config)
        if needs not in devices:
            devices[needs] = current_device(needs, settings.prefill_provider)
        layer.impl.device = devices[needs]
        installed.append(name)
    if kept and not installed:
        raise _refusal(
            kept[0], "like all others it has a sliding window, which DCA leaves alone"
        )
    if installed:
        logger.info_once(
            "DCA attends %d layers: %s .. %s%s; prefill by %s",
            len(installed),
            installed[0],
            installed[-1],
            f"; {len(kept)} with a sliding window keep their own attention" if kept else "",
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


def _lengthen(layer_name: str, rotary: RotaryEmbedding, max_model_len: int) -> RotaryEmbedding:
    """The module, or a copy with rows for every position that a request can reach."""
    if len(rotary.cos_sin_cache) >= max_model_len:
        return rotary
    if type(rotary) not in _GROWABLE:
        raise _refusal(
            layer_name,
            f"its {type(rotary).__name__} ends at {len(rotary.cos_sin_cache)} positions",
        )
    longer = copy.deepcopy(rotary)
    longer.max_position_embeddings = max_model_len
    longer.cos_sin_cache = longer._compute_cos_sin_cache().to(rotary.cos_sin_cache.dtype)
    return longer


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
