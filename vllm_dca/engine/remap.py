"""Position remap: a periodic rotary table for the layers that DCA attends, and no others."""

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import get_pp_group
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionBackend

from vllm_dca.engine.devices import current_device, needs_of
from vllm_dca.engine.dry_run import NotUnderstoodError
from vllm_dca.engine.layers import check_kept, layers_of, refusal
from vllm_dca.engine.log import logger
from vllm_dca.engine.rotary_check import check_rotation
from vllm_dca.engine.rotary_replacements import RotaryReplacements
from vllm_dca.engine.rotary_trace import Rotation, rotation_of
from vllm_dca.engine.settings import settings_of
from vllm_dca.engine.sparse_layers import rule_of_layer, sparse_sizes
from vllm_dca.engine.sparse_metrics import RecallSampler
from vllm_dca.engine.warmup import KERNELS
from vllm_dca.method.device import Device
from vllm_dca.method.provider import Needs
from vllm_dca.method.rotary import QueryRotation
from vllm_dca.method.sparse_prefill import SparsePrefill, SparseSizes


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
    attended, kept = layers = layers_of(model, dca_backend)
    # All are followed before one is changed.
    rotations = {name: _rotation(name, model, vllm_config) for name in (*attended, *kept)}
    rotating = [name for name in attended if rotations[name] is not None]
    if attended and not rotating and get_pp_group().world_size == 1:
        raise refusal(
            next(iter(attended)),
            "it has no rotary positions, nor has any other layer that sees the whole text, so "
            "there is nothing for DCA to change; without DCA the model takes any length that "
            "its other layers do",
        )
    check_kept(layers, vllm_config, dca_backend)
    rotaries = RotaryReplacements(settings, vllm_config.model_config.max_model_len)
    for name in kept:
        if (found := rotations[name]) is not None:
            rotaries.make_long(name, found, model.get_submodule(name.rpartition(".")[0]))
    device_of = functools.cache(lambda needs: current_device(needs, settings.prefill_provider))
    sparse_of = functools.cache(functools.partial(_sparse, device_of))
    sampler = None if settings.sparse is None else RecallSampler(vllm_config)
    for name, layer in attended.items():
        turned = remap_layer(name, rotations[name], model, vllm_config, rotaries)
        _prepare(name, layer, turned, vllm_config, device_of)
        if sampler is not None:
            _prepare_sparse(name, layer, vllm_config, sparse_of, sampler)
    rotaries.forget_replaced(model)
    # Otherwise the first long prompt waits for Triton to compile.
    KERNELS.register_warmup()
    if attended:
        providers = sorted({each.impl.prepared.device.provider for each in attended.values()})
        _log_attended(list(attended), list(kept), len(attended) - len(rotating), providers)


def _rotation(
    layer_name: str, model: torch.nn.Module, vllm_config: VllmConfig
) -> Rotation | None:
    """What rotates a layer, of a model as it was built."""
    with _naming(layer_name), set_current_vllm_config(vllm_config):
        return rotation_of(layer_name, model)


def remap_layer(
    layer_name: str,
    found: Rotation | None,
    model: torch.nn.Module,
    vllm_config: VllmConfig,
    rotaries: RotaryReplacements,
) -> QueryRotation:
    """Give a layer positions with a period; how its queries are turned further.

    Args:
        layer_name: of the layer.
        found: what rotates it; None if nothing does.
        model: it is in.
        vllm_config: as start-up settled it.
        rotaries: of the model.

    Raises:
        NotImplementedError: its positions cannot be remapped, or it does more with them.
    """
    geometry = settings_of(vllm_config).geometry
    num_positions = min(geometry.chunk_len, rotaries.max_model_len)
    if found is None:
        # However its queries are turned, nothing is rotated: DCA is ordinary attention.
        nothing = torch.tensor([[1.0, 0.0]], dtype=torch.float32)
        rotation = QueryRotation(nothing.repeat(geometry.chunk_size + 1, 1), True)
    else:
        parent = model.get_submodule(layer_name.rpartition(".")[0])
        rotation = rotaries.make_periodic(layer_name, found, parent)
    with _naming(layer_name), set_current_vllm_config(vllm_config):
        check_rotation(layer_name, model, rotation, num_positions, found is not None)
    return rotation


def _prepare(
    layer_name: str,
    layer: Attention,
    rotation: QueryRotation,
    vllm_config: VllmConfig,
    device_of: Callable[[Needs], Device],
) -> None:
    """Tell a layer's attention how it turns queries, and what computes it here."""
    if layer.head_size_v != layer.head_size:
        raise refusal(
            layer_name,
            f"its keys have {layer.head_size} entries, its values {layer.head_size_v}",
            "as many of both",
        )
    # As a buffer it outlives what frees or moves the weights, such as vLLM's sleep mode.
    layer.register_buffer("dca_cos_sin", rotation.cos_sin, persistent=False)
    needs = needs_of(layer, vllm_config)
    layer.impl.prepare(rotation, device_of(needs), needs.cache_dtype)


def _prepare_sparse(
    layer_name: str,
    layer: Attention,
    vllm_config: VllmConfig,
    sparse_of: Callable[[Needs, SparseSizes], SparsePrefill],
    sampler: RecallSampler,
) -> None:
    """What a layer with sparse prefill needs besides."""
    rule = rule_of_layer(layer, vllm_config)
    if rule is None:
        return
    if layer.impl.soft_cap is not None or layer.impl.sinks is not None:
        raise refusal(layer_name, "sparse prefill knows no soft cap and no sinks")
    rule = rule.to(layer.impl.prepared.rotation.cos_sin.device)
    # As buffers, too; None where lines are selected by coverage.
    layer.register_buffer("dca_verticals", rule.verticals, persistent=False)
    layer.register_buffer("dca_slashes", rule.slashes, persistent=False)
    sizes = sparse_sizes(vllm_config, layer.num_heads)
    layer.impl.prepare_sparse(rule, sparse_of(needs_of(layer, vllm_config), sizes), sampler)


def _sparse(
    device_of: Callable[[Needs], Device], needs: Needs, sizes: SparseSizes
) -> SparsePrefill:
    """What prefills a layer sparsely; it is cached: layers of one kind share its buffers."""
    make_ready = device_of(needs).sparse
    assert make_ready is not None
    return make_ready(sizes)


def _log_attended(
    attended: list[str], kept: list[str], unrotated: int, providers: list[str]
) -> None:
    logger.info_once(
        "DCA attends %d layers: %s .. %s%s%s; prefill by %s",
        len(attended),
        attended[0],
        attended[-1],
        f"; {len(kept)} with a sliding window keep their own attention" if kept else "",
        f"; {unrotated} of them have no rotary positions" if unrotated else "",
        ", ".join(providers),
    )


@contextlib.contextmanager
def _naming(layer_name: str) -> Iterator[None]:
    """What is not understood in here is refused, with the layer's name."""
    try:
        yield
    except NotUnderstoodError as error:
        raise refusal(
            layer_name,
            str(error),
            "queries and keys that one rotary embedding rotates alike, just before they attend",
        ) from error
