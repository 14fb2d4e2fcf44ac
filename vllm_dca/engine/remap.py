"""Position remap: a periodic rotary table for the layers that DCA attends, and no others."""

import copy
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.rotary_embedding import (
    _ROPE_DICT,
    DynamicNTKScalingRotaryEmbedding,
    LinearScalingRotaryEmbedding,
    Llama3RotaryEmbedding,
    RotaryEmbedding,
    YaRNScalingRotaryEmbedding,
)
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionBackend

from vllm_dca.engine import transformers_rotary
from vllm_dca.engine.block_size import block_size_of
from vllm_dca.engine.devices import compute_capability, current_device
from vllm_dca.engine.recall import RecallWatch
from vllm_dca.engine.settings import settings_of
from vllm_dca.engine.support import cache_dtype_of
from vllm_dca.engine.transformers_rotary import PeriodicRotary
from vllm_dca.engine.warmup import KERNELS
from vllm_dca.method.config import DcaSettings
from vllm_dca.method.device import Device
from vllm_dca.method.lines import Rule, rule_of
from vllm_dca.method.provider import Needs
from vllm_dca.method.rotary import QueryRotation, periodic_table, unit_table

# vLLM's logger is set up for its own package only.
logger = init_logger("vllm.plugins.dca")

# Exactly these: a subclass may give its table another meaning.
_GROWABLE = (RotaryEmbedding, Llama3RotaryEmbedding)
_SUPPORTED = (
    *_GROWABLE,
    DynamicNTKScalingRotaryEmbedding,
    LinearScalingRotaryEmbedding,
    YaRNScalingRotaryEmbedding,
)


def remap_layers(
    model: torch.nn.Module, vllm_config: VllmConfig, dca_backend: type[AttentionBackend]
) -> None:
    """Prepare every attention layer of a freshly built model.

    vLLM shares rotary modules between layers, some of which DCA may not attend, so a layer
    gets a copy with the periodic table; layers that shared one module share the copy. Layers
    with a sliding window keep their attention and their positions, in a table that is long
    enough for them.

    Args:
        model: its modules are changed in place.
        vllm_config: as start-up settled it.
        dca_backend: of the layers that DCA attends.

    Raises:
        NotImplementedError: a layer whose positions cannot be remapped, named.
    """
    settings = settings_of(vllm_config)
    tables = _Tables(settings, vllm_config.model_config.max_model_len)
    devices: dict[Needs, Device] = {}
    remapped, kept = [], []
    for name, layer in model.named_modules():
        if not isinstance(layer, Attention):
            continue
        if layer.attn_backend is not dca_backend:
            if layer.sliding_window is None:
                raise _refusal(name, f"its attention would be {layer.attn_backend.__name__}")
            owner, rotary_name = _find_rotary(name, model)
            longer = tables.lengthen(name, getattr(owner, rotary_name))
            setattr(owner, rotary_name, longer)
            kept.append(name)
            continue
        if _has_positions(layer.layer_name, vllm_config):
            owner, rotary_name = _find_rotary(name, model)
            periodic, rotation = tables.remap(name, getattr(owner, rotary_name))
            setattr(owner, rotary_name, periodic)
        else:
            # However its queries are turned, nothing is rotated: DCA is ordinary attention.
            nothing = torch.tensor([[1.0, 0.0]], dtype=torch.float32)
            rotation = QueryRotation(nothing.repeat(settings.chunk_size + 1, 1), True)
        # As a buffer it outlives what frees or moves the weights, such as vLLM's sleep mode.
        layer.register_buffer("dca_cos_sin", rotation.cos_sin, persistent=False)
        needs = _needs(layer, vllm_config)
        if needs not in devices:
            devices[needs] = current_device(needs, settings.prefill_provider)
        rule = _rule(layer, vllm_config)
        layer.impl.prepare(rotation, devices[needs], needs.cache_dtype, rule)
        if rule is not None:
            layer.impl.watch = RecallWatch(vllm_config)
        remapped.append(name)
    tables.forget_replaced(model)
    # A long prompt would else wait for it.
    KERNELS.register_warmup()
    if remapped:
        logger.info_once(
            "DCA attends %d layers: %s .. %s%s; prefill by %s",
            len(remapped),
            remapped[0],
            remapped[-1],
            f"; {len(kept)} with a sliding window keep their own attention" if kept else "",
            ", ".join(sorted({device.provider for device in devices.values()})),
        )


def _has_positions(layer_name: str, vllm_config: VllmConfig) -> bool:
    """Whether a layer rotates its queries and keys; some models' do not in some layers."""
    rotating = getattr(vllm_config.model_config.hf_text_config, "no_rope_layers", None) or []
    index = extract_layer_index(layer_name)
    # Past the model's own layers are a drafter's.
    return index >= len(rotating) or bool(rotating[index])


def _rule(layer: Attention, vllm_config: VllmConfig) -> Rule | None:
    """How a layer's lines are selected; None where its prefill is dense, as a drafter's is."""
    settings = settings_of(vllm_config).sparse
    layers = vllm_config.model_config.hf_text_config.num_hidden_layers
    index = extract_layer_index(layer.layer_name)
    if settings is None or index >= layers or layer.layer_name.startswith("draft_model."):
        return None
    rank, heads = get_tensor_model_parallel_rank(), layer.num_heads
    return rule_of(settings, index, slice(rank * heads, (rank + 1) * heads))


def _needs(layer: Attention, vllm_config: VllmConfig) -> Needs:
    dtype = vllm_config.model_config.dtype
    return Needs(
        head_size=layer.head_size,
        dtype=dtype,
        cache_dtype=cache_dtype_of(layer.kv_cache_dtype, dtype),
        block_size=block_size_of(vllm_config),
        capability=compute_capability(),
    )


def _refusal(layer_name: str, reason: str) -> NotImplementedError:
    return NotImplementedError(
        f"--attention-backend dca cannot serve this model: layer {layer_name}: {reason}. "
        "DCA needs a rotary embedding of type "
        f"{', '.join(cls.__name__ for cls in _SUPPORTED)} beside each attention, or "
        "transformers' own. Use another attention backend."
    )


def _find_rotary(layer_name: str, model: torch.nn.Module) -> tuple[torch.nn.Module, str]:
    """The module that holds a layer's rotary module, and its name there."""
    parent = model.get_submodule(layer_name.rpartition(".")[0])
    candidates = [
        name
        for name, child in parent.named_children()
        if hasattr(child, "cos_sin_cache") or "Rotary" in type(child).__name__
    ]
    if len(candidates) > 1:
        raise _refusal(layer_name, f"it has several rotary embeddings, {', '.join(candidates)}")
    if candidates:
        return parent, candidates[0]
    found = transformers_rotary.find_rotary(model, layer_name)
    if found is None:
        raise _refusal(layer_name, "it has no rotary embedding")
    return found


class _Tables:
    """The rotary modules that replace a model's own; layers that shared one share its heir."""

    def __init__(self, settings: DcaSettings, max_model_len: int) -> None:
        self.settings = settings
        self.max_model_len = max_model_len
        self.remapped: dict[int, tuple[torch.nn.Module, QueryRotation]] = {}
        self.lengthened: dict[int, RotaryEmbedding] = {}

    def remap(self, layer_name: str, rotary: Any) -> tuple[torch.nn.Module, QueryRotation]:
        """The module with a period, and how its queries are turned further."""
        key = id(rotary.rotary if isinstance(rotary, PeriodicRotary) else rotary)
        if key not in self.remapped:
            if type(rotary) in _SUPPORTED:
                self.remapped[key] = _remap(rotary, self.settings, self.max_model_len)
            elif hasattr(rotary, "cos_sin_cache"):
                kind = type(rotary).__name__
                raise _refusal(layer_name, f"its rotary embedding is a {kind}")
            else:
                geometry = self.settings.geometry
                try:
                    self.remapped[key] = transformers_rotary.remap(
                        rotary, geometry.chunk_size, geometry.chunk_len
                    )
                except ValueError as error:
                    raise _refusal(layer_name, str(error)) from error
        return self.remapped[key]

    def forget_replaced(self, model: torch.nn.Module) -> None:
        """Take what no layer uses any more out of vLLM's collection of rotary modules.

        It would stay beside its heir for good, a million rows for a Qwen-1M checkpoint. Another
        model that has the module holds it; one that wants it later has vLLM build it anew.
        """
        replaced = {*self.remapped, *self.lengthened} - {id(each) for each in model.modules()}
        for key in [key for key, rotary in _ROPE_DICT.items() if id(rotary) in replaced]:
            del _ROPE_DICT[key]

    def lengthen(self, layer_name: str, rotary: Any) -> RotaryEmbedding:
        """The module, or a copy with rows for every position that a request can reach."""
        if id(rotary) not in self.lengthened:
            if type(rotary) not in _GROWABLE:
                raise _refusal(layer_name, f"it has a window, and a {type(rotary).__name__}")
            longer = rotary
            if len(rotary.cos_sin_cache) < self.max_model_len:
                longer = copy.deepcopy(rotary)
                longer.max_position_embeddings = self.max_model_len
                table = longer._compute_cos_sin_cache().to(rotary.cos_sin_cache.dtype)
                longer.cos_sin_cache = table
            self.lengthened[id(rotary)] = longer
        return self.lengthened[id(rotary)]


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
