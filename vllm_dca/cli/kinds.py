"""How each of a model's layers attends, in words."""

import dataclasses
from collections.abc import Mapping
from typing import Any

# By what vLLM calls the kind of state that such a layer keeps.
_STATES = {
    "GDN_ATTN": "linear attention",
    "LINEAR": "linear attention",
    "MAMBA1": "Mamba",
    "MAMBA2": "Mamba",
    "SHORT_CONV": "short convolutions",
}


@dataclasses.dataclass(frozen=True)
class LayerKinds:
    """Which of a model's layers DCA attends.

    Attributes:
        dca: names of those that it attends.
        unrotated: names of those among them without rotary positions.
        others: names of those that keep what they have, by what that is.
        softmax: what the softmax of DCA's layers has beside the scores; empty for most.
        state_offset: where vLLM counts on for states of layers that attend too (Falcon-H1).
    """

    dca: list[str]
    unrotated: list[str]
    others: dict[str, list[str]]
    softmax: str
    state_offset: int | None = None

    @property
    def described(self) -> str:
        """For people to read."""
        indices = _indices(self.dca)
        others = {
            what: sorted({self._layer(i) for i in _indices(names)})
            for what, names in self.others.items()
        }
        total = len(set(indices).union(*others.values()))
        said = [f"{len(indices)} of {total} layers: {_runs(indices)}"]
        if self.unrotated:
            bare = _indices(self.unrotated)
            said.append(f"{_runs(bare)} without rotary positions, where DCA changes nothing")
        said += [
            f"{_runs(kept)} keep{'s its' if len(kept) == 1 else ' their'} {what}"
            for what, kept in others.items()
        ]
        return "; ".join(said)

    def _layer(self, index: int) -> int:
        return index if self.state_offset is None else index % self.state_offset


def kinds_of(
    layers: Mapping[str, Any], unrotated: list[str], state_offset: int | None = None
) -> LayerKinds:
    """Tell the layers of a model apart.

    Args:
        layers: vLLM's, by name, as the model was built.
        unrotated: names of those that rotate nothing.
        state_offset: see `LayerKinds`.
    """
    from vllm_dca.engine.backend import DcaBackend

    dca = [name for name, layer in layers.items() if layer.get_attn_backend() is DcaBackend]
    others: dict[str, list[str]] = {}
    for name in layers:
        if name not in dca:
            others.setdefault(_kept(layers[name]), []).append(name)
    impls = [layers[name].impl for name in dca]
    caps = sorted({impl.soft_cap for impl in impls if impl.soft_cap is not None})
    softmax = [f"a soft cap of {cap:g}" for cap in caps]
    if any(impl.sinks is not None for impl in impls):
        softmax.append("sinks")
    unrotated = [name for name in unrotated if name in dca]
    return LayerKinds(dca, unrotated, others, " and ".join(softmax), state_offset)


def _kept(layer: Any) -> str:
    window = getattr(layer, "sliding_window", None)
    if window is not None:
        return f"sliding window of {window} tokens"
    state = getattr(layer, "mamba_type", None)
    if state is not None:
        return _STATES.get(state.name, type(layer).__name__)
    return type(layer).__name__


def _indices(names: list[str]) -> list[int]:
    from vllm.model_executor.models.utils import extract_layer_index

    return sorted({extract_layer_index(name) for name in names})


def _runs(numbers: list[int]) -> str:
    """Runs as first-last: "0-4, 6"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
