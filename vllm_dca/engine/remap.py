"""Position remap: a periodic rotary table for the layers that DCA attends, and no others."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import get_pp_group
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.rotary_embedding import _ROPE_DICT
from vllm.v1.attention.backend import AttentionBackend

from vllm_dca.engine import rotary_tables, transformers_rotary
from vllm_dca.engine.devices import current_device, needs_of
from vllm_dca.engine.following import NotUnderstoodError, Rotation, rotation_of
from vllm_dca.engine.layers import check_kept, layers_of, refusal
from vllm_dca.engine.log import logger
from vllm_dca.engine.recall import RecallWatch
from vllm_dca.engine.settings import settings_of
from vllm_dca.engine.sparse_layers import rule_of_layer, sparse_sizes
from vllm_dca.engine.turning import check_turns
from vllm_dca.engine.warmup import KERNELS
from vllm_dca.method.config import DcaSettings
from vllm_dca.method.device import Device
from vllm_dca.method.provider import Needs
from vllm_dca.method.rotary import QueryRotation
from vllm_dca.method.sparse import SparsePrefill, SparseSizes

_ROTARY = (
    "transformers' own rotary embedding, or one of vLLM's "
    f"{', '.join(each.__name__ for each in rotary_tables.SUPPORTED)}"
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
    tables = _Tables(settings, vllm_config.model_config.max_model_len)
    for name in kept:
        if (found := rotations[name]) is not None:
            tables.lengthen(name, found, model.get_submodule(name.rpartition(".")[0]))
    device_of = functools.cache(lambda needs: current_device(needs, settings.prefill_provider))
    sparse_of = functools.cache(functools.partial(_sparse, device_of))
    for name, layer in attended.items():
        turned = _periodic(name, rotations[name], model, vllm_config, tables)
        _prepare(name, layer, turned, vllm_config, device_of, sparse_of)
    tables.forget_replaced(model)
    # A long prompt would else wait for it.
    KERNELS.register_warmup()
    if attended:
        providers = sorted({each.impl.device.provider for each in attended.values()})
        _log_attended(list(attended), list(kept), len(attended) - len(rotating), providers)


def _rotation(
    layer_name: str, model: torch.nn.Module, vllm_config: VllmConfig
) -> Rotation | None:
    """What rotates a layer, of a model as it was built."""
    with _naming(layer_name), set_current_vllm_config(vllm_config):
        return rotation_of(layer_name, model)


def _periodic(
    layer_name: str,
    found: Rotation | None,
    model: torch.nn.Module,
    vllm_config: VllmConfig,
    tables: "_Tables",
) -> QueryRotation:
    """Give a layer positions with a period; how its queries are turned further."""
    geometry = settings_of(vllm_config).geometry
    if found is None:
        # However its queries are turned, nothing is rotated: DCA is ordinary attention.
        nothing = torch.tensor([[1.0, 0.0]], dtype=torch.float32)
        rotation = QueryRotation(nothing.repeat(geometry.chunk_size + 1, 1), True)
    else:
        parent = model.get_submodule(layer_name.rpartition(".")[0])
        rotation = tables.remap(layer_name, found, parent)
    with _naming(layer_name), set_current_vllm_config(vllm_config):
        check_turns(layer_name, model, rotation, geometry.chunk_len, found is not None)
    return rotation


def _prepare(
    layer_name: str,
    layer: Attention,
    rotation: QueryRotation,
    vllm_config: VllmConfig,
    device_of: Callable[[Needs], Device],
    sparse_of: Callable[[Needs, SparseSizes], SparsePrefill],
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
    needs, rule = needs_of(layer, vllm_config), rule_of_layer(layer, vllm_config)
    device = device_of(needs)
    has_more = layer.impl.soft_cap is not None or layer.impl.sinks is not None
    if has_more and rule is not None:
        raise refusal(layer_name, "sparse prefill knows no soft cap and no sinks")
    layer.impl.prepare(rotation, device, needs.cache_dtype)
    if rule is not None:
        rule = rule.to(rotation.cos_sin.device)
        # Likewise; None where lines are selected by coverage.
        layer.register_buffer("dca_verticals", rule.verticals, persistent=False)
        layer.register_buffer("dca_slashes", rule.slashes, persistent=False)
        layer.impl.prepare_sparse(
            rule,
            sparse_of(needs, sparse_sizes(vllm_config, layer.num_heads)),
            RecallWatch(vllm_config),
        )


def _sparse(
    device_of: Callable[[Needs], Device], needs: Needs, sizes: SparseSizes
) -> SparsePrefill:
    """Layers of one kind share its buffers."""
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


class _Tables:
    """The rotary modules that replace a model's own; layers that shared one share its heir."""

    def __init__(self, settings: DcaSettings, max_model_len: int) -> None:
        self.settings = settings
        self.max_model_len = max_model_len
        self.heirs: dict[tuple[int, str | None], Any] = {}
        self.shared: dict[int, transformers_rotary.PeriodicRotary] = {}
        self.placed: dict[tuple[int, str], torch.nn.Module] = {}
        self.replaced: set[int] = set()

    def remap(
        self, layer_name: str, found: Rotation, attention: torch.nn.Module
    ) -> QueryRotation:
        """Put the module with a period in its place; how its queries are turned further."""
        rotary: Any = found.rotary
        layer_type = None
        if not rotary_tables.has_table(rotary):
            layer_type = transformers_rotary.layer_type_of(rotary, attention)
        key = (id(rotary), f"periodic {layer_type}")
        if key not in self.heirs:
            geometry = self.settings.geometry
            try:
                if rotary_tables.has_table(rotary):
                    self.heirs[key] = rotary_tables.remap(
                        rotary, geometry.chunk_size, geometry.chunk_len, self.max_model_len
                    )
                else:
                    made, rotation = transformers_rotary.remap(
                        rotary, geometry.chunk_size, geometry.chunk_len, layer_type
                    )
                    # One for all types of layers that DCA attends.
                    shared = self.shared.setdefault(id(rotary), made)
                    shared.layer_types |= made.layer_types
                    self.heirs[key] = shared, rotation
            except ValueError as error:
                raise refusal(layer_name, str(error), _ROTARY) from error
        periodic, rotation = self.heirs[key]
        self._put(layer_name, found, periodic)
        return rotation

    def lengthen(self, layer_name: str, found: Rotation, attention: torch.nn.Module) -> None:
        """Put a module in its place that has rows for every position a request can reach."""
        rotary: Any = found.rotary
        if not rotary_tables.has_table(rotary):
            # It has no rows, and what has a period tells types of layers apart.
            if transformers_rotary.layer_type_of(rotary, attention) is None:
                self._put(layer_name, found, rotary)
            return
        key = (id(rotary), None)
        if key not in self.heirs:
            try:
                self.heirs[key] = rotary_tables.lengthened(rotary, self.max_model_len)
            except ValueError as error:
                raise refusal(layer_name, f"it has a window, and {error}", _ROTARY) from error
        self._put(layer_name, found, self.heirs[key])

    def _put(self, layer_name: str, found: Rotation, heir: torch.nn.Module) -> None:
        for owner, name in found.places:
            if self.placed.setdefault((id(owner), name), heir) is not heir:
                raise refusal(
                    layer_name,
                    "layers with a window and layers without share its positions",
                    f"a {type(found.rotary).__name__} for each of the two kinds",
                )
            setattr(owner, name, heir)
        self.replaced.add(id(found.rotary))

    def forget_replaced(self, model: torch.nn.Module) -> None:
        """Take what no layer uses any more out of vLLM's collection of rotary modules.

        It would stay beside its heir for good, a million rows for a Qwen-1M checkpoint. Another
        model that has the module holds it; one that wants it later has vLLM build it anew.
        """
        replaced = self.replaced - {id(each) for each in model.modules()}
        for key in [key for key, rotary in _ROPE_DICT.items() if id(rotary) in replaced]:
            del _ROPE_DICT[key]
