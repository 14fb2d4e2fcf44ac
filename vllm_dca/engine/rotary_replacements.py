"""The rotary modules that replace a model's own: with a period, or with more rows."""

from typing import Any

import torch
from vllm.model_executor.layers.rotary_embedding import _ROPE_DICT

from vllm_dca.engine import rotary_tables, transformers_rotary
from vllm_dca.engine.layers import refusal
from vllm_dca.engine.rotary_trace import Rotation
from vllm_dca.method.config import DcaSettings
from vllm_dca.method.rotary import QueryRotation

_ROTARY = (
    "transformers' own rotary embedding, or one of vLLM's "
    f"{', '.join(each.__name__ for each in rotary_tables.SUPPORTED)}"
)

# A module of the model, by its id, and the type of layer that it is asked for.
_Of = tuple[int, str | None]


class RotaryReplacements:
    """One for each module of the model: layers that shared a module share what replaces it."""

    def __init__(self, settings: DcaSettings, max_model_len: int) -> None:
        self.settings = settings
        self.max_model_len = max_model_len
        self.periodic: dict[_Of, tuple[torch.nn.Module, QueryRotation]] = {}
        self.lengthened: dict[int, torch.nn.Module] = {}
        self.of_transformers: dict[int, transformers_rotary.PeriodicRotary] = {}
        self.placed: dict[tuple[int, str], torch.nn.Module] = {}
        self.replaced: set[int] = set()

    def make_periodic(
        self, layer_name: str, found: Rotation, attention: torch.nn.Module
    ) -> QueryRotation:
        """Put a module with a period in its place; how the layer's queries are turned further.

        Args:
            layer_name: of the layer, for messages.
            found: what rotates it.
            attention: the module around it.

        Raises:
            NotImplementedError: its positions cannot be remapped.
        """
        rotary: Any = found.rotary
        layer_type = None
        if not rotary_tables.has_table(rotary):
            layer_type = transformers_rotary.layer_type_of(rotary, attention)
        key = (id(rotary), layer_type)
        if key not in self.periodic:
            try:
                self.periodic[key] = self._periodic(rotary, layer_type)
            except ValueError as error:
                raise refusal(layer_name, str(error), _ROTARY) from error
        replacement, rotation = self.periodic[key]
        self._put(layer_name, found, replacement)
        return rotation

    def _periodic(
        self, rotary: Any, layer_type: str | None
    ) -> tuple[torch.nn.Module, QueryRotation]:
        sizes = self.settings.geometry.chunk_size, self.settings.geometry.chunk_len
        if rotary_tables.has_table(rotary):
            return rotary_tables.periodic(rotary, *sizes, self.max_model_len)
        made, rotation = transformers_rotary.periodic(rotary, *sizes, layer_type)
        # One for all types of layers that DCA attends.
        shared = self.of_transformers.setdefault(id(rotary), made)
        shared.layer_types |= made.layer_types
        return shared, rotation

    def make_long(self, layer_name: str, found: Rotation, attention: torch.nn.Module) -> None:
        """Put a module in its place that has rows for every position a request can reach.

        Args:
            layer_name: of a layer that DCA does not attend.
            found: what rotates it.
            attention: the module around it.

        Raises:
            NotImplementedError: its table cannot be made longer.
        """
        rotary: Any = found.rotary
        if not rotary_tables.has_table(rotary):
            # It has no rows, and what has a period tells types of layers apart.
            if transformers_rotary.layer_type_of(rotary, attention) is None:
                self._put(layer_name, found, rotary)
            return
        if id(rotary) not in self.lengthened:
            try:
                longer = rotary_tables.lengthened(rotary, self.max_model_len)
            except ValueError as error:
                raise refusal(layer_name, f"it has a window, and {error}", _ROTARY) from error
            self.lengthened[id(rotary)] = longer
        self._put(layer_name, found, self.lengthened[id(rotary)])

    def _put(self, layer_name: str, found: Rotation, replacement: torch.nn.Module) -> None:
        for owner, name in found.places:
            if self.placed.setdefault((id(owner), name), replacement) is not replacement:
                raise refusal(
                    layer_name,
                    "layers with a window and layers without share its positions",
                    f"a {type(found.rotary).__name__} for each of the two kinds",
                )
            setattr(owner, name, replacement)
        self.replaced.add(id(found.rotary))

    def forget_replaced(self, model: torch.nn.Module) -> None:
        """Take what no layer uses any more out of vLLM's collection of rotary modules.

        It would stay beside its replacement for good, a million rows for a Qwen-1M checkpoint.
        Another model that has the module holds it; one that wants it later has vLLM build it
        anew.
        """
        replaced = self.replaced - {id(each) for each in model.modules()}
        for key in [key for key, rotary in _ROPE_DICT.items() if id(rotary) in replaced]:
            del _ROPE_DICT[key]
