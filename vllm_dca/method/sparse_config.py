"""Options of sparse prefill, and the budgets that a checkpoint brings for it.

Like `vllm_dca.method.config`, it knows nothing of vLLM.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_dca.method.geometry import ChunkGeometry
from vllm_dca.method.options import share, token_count

MODE_KEY = "sparse"
THRESHOLD_KEY = "sparse_threshold"
COVERAGE_KEY = "sparse_coverage"
MIN_KEYS_KEY = "sparse_min_keys"
BUDGETS_KEY = "sparse_budgets"
MIN_RECALL_KEY = "sparse_min_recall"
SPARSE_KEYS = (
    MODE_KEY,
    THRESHOLD_KEY,
    COVERAGE_KEY,
    MIN_KEYS_KEY,
    BUDGETS_KEY,
    MIN_RECALL_KEY,
)
OFF, CHECKPOINT, AUTO = "off", "checkpoint", "auto"
# Which options go with which mode.
_OPTIONS = {
    OFF: (),
    CHECKPOINT: (THRESHOLD_KEY, MIN_RECALL_KEY, BUDGETS_KEY),
    AUTO: (THRESHOLD_KEY, MIN_RECALL_KEY, COVERAGE_KEY, MIN_KEYS_KEY),
}
# Qwen's checkpoints' own.
THRESHOLD = 32768
# FlexPrefill's.
COVERAGE = 0.95
MIN_KEYS = 1024
# Rows that share the keys of a slash; a tile lies in one chunk.
TILE = 64
KIND = "vertical_and_slash"

# Of each layer, by its number, and each head: verticals and slashes.
Budgets = tuple[tuple[tuple[int, int], ...], ...]


@dataclass(frozen=True)
class SparseSettings:
    """Resolved settings of sparse prefill.

    Attributes:
        threshold: tokens before this position attend to all before them.
        coverage: with "auto", the share of attention that a head's lines cover.
        min_keys: with "auto", at least as many verticals and as many keys in blocks.
        budgets: with "checkpoint", of each layer and head; a layer without has none.
        min_recall: the share of attention under which a warning is due.
    """

    threshold: int
    coverage: float
    min_keys: int
    budgets: Budgets | None
    min_recall: float = 0.0

    @property
    def described(self) -> str:
        """For people to read."""
        start = f"from position {self.threshold} on, by "
        if self.budgets is not None:
            return f"{start}the checkpoint's budgets"
        return (
            f"{start}lines that cover {self.coverage:g} of each head's attention, at least "
            f"{self.min_keys} keys of either kind"
        )


def validate_sparse_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Check those of the user's options that are of sparse prefill.

    Raises:
        ValueError: unusable values, or options that the mode has no use for.
    """
    mode = options.get(MODE_KEY, OFF)
    if not isinstance(mode, str) or mode not in _OPTIONS:
        raise ValueError(
            f"DCA's {MODE_KEY} must be one of {', '.join(_OPTIONS)}, not {mode!r}."
        )
    given = {key: options[key] for key in SPARSE_KEYS[1:] if key in options}
    for key in given:
        if key not in _OPTIONS[mode]:
            modes = " or ".join(f'"{each}"' for each in _OPTIONS if key in _OPTIONS[each])
            raise ValueError(
                f'DCA\'s {key} is for "{MODE_KEY}": {modes}, and that is {mode!r}.'
            )
    for key, value in given.items():
        _CHECKS[key](key, value)
    return {MODE_KEY: mode, **given}


def _path(key: str, value: object) -> None:
    if not isinstance(value, str):
        raise ValueError(f"DCA's {key} must be a file's path, not {value!r}.")


_any_tokens = functools.partial(token_count, least=0)
_CHECKS: dict[str, Callable[[str, object], object]] = {
    THRESHOLD_KEY: _any_tokens,
    MIN_KEYS_KEY: _any_tokens,
    COVERAGE_KEY: share,
    MIN_RECALL_KEY: share,
    BUDGETS_KEY: _path,
}


def resolve_sparse(
    options: Mapping[str, Any],
    checkpoint: Mapping[str, Any] | None,
    geometry: ChunkGeometry,
    config: object,
    attended: Sequence[int],
    num_heads: int,
) -> SparseSettings | None:
    """Settle sparse prefill; None if it is off.

    Args:
        options: as `validate_sparse_options` returns them.
        checkpoint: its dual_chunk_attention_config, if it has one.
        geometry: the chunk sizes.
        config: with "checkpoint", its sparse_attention_config, or nothing.
        attended: numbers of the layers that DCA attends.
        num_heads: query heads of a layer.

    Raises:
        ValueError: what was given, what is needed, what would work.
    """
    mode = options[MODE_KEY]
    if mode == OFF:
        return None
    chunk_len = geometry.chunk_len
    if chunk_len % TILE:
        better = geometry.chunk_size - max(chunk_len // TILE, 1) * TILE
        raise ValueError(
            f"DCA's sparse prefill needs a chunk length that is a multiple of {TILE}, but "
            f"chunk_size {geometry.chunk_size} - local_size {geometry.local_size} = "
            f"{chunk_len}: choose another, such as local_size {better}."
        )
    budgets = None
    if mode == CHECKPOINT:
        if not config:
            raise ValueError(
                f'DCA\'s "{MODE_KEY}": "{CHECKPOINT}" needs budgets, and the checkpoint has no '
                f"sparse_attention_config.json. Name such a file by {BUDGETS_KEY}, or choose "
                f'"{AUTO}", which serves any model.'
            )
        budgets = read_budgets(config, attended, num_heads)
    name = "sparse_attention_threshold"
    threshold = options.get(THRESHOLD_KEY)
    if threshold is None:
        threshold = token_count(name, (checkpoint or {}).get(name, THRESHOLD), least=0)
    return SparseSettings(
        threshold,
        options.get(COVERAGE_KEY, COVERAGE),
        options.get(MIN_KEYS_KEY, MIN_KEYS),
        budgets,
        options.get(MIN_RECALL_KEY, 0.0),
    )


def read_budgets(config: object, attended: Sequence[int], num_heads: int) -> Budgets:
    """From what a sparse_attention_config.json holds.

    Args:
        config: by layer, as a list or by number, and then by head: ["vertical_and_slash",
            verticals, slashes, a score].
        attended: the layers that must have budgets.
        num_heads: how many heads of each must.

    Raises:
        ValueError: a layer or head without a budget, or one of another kind; no such layers.
    """
    if not attended:
        raise ValueError(
            "DCA's sparse prefill cannot tell which layers the budgets are of: the model's "
            f'layer_types name none of full attention. Choose "{MODE_KEY}": "{AUTO}".'
        )
    layers = _numbered(config, "sparse_attention_config")
    return tuple(
        _of_layer(layers, layer, num_heads) if layer in attended else ()
        for layer in range(max(attended) + 1)
    )


def _of_layer(
    layers: Mapping[int, object], layer: int, num_heads: int
) -> tuple[tuple[int, int], ...]:
    heads = _numbered(layers.get(layer, {}), f"layer {layer} of sparse_attention_config")
    return tuple(_of_head(heads.get(head), layer, head) for head in range(num_heads))


def _of_head(entry: object, layer: int, head: int) -> tuple[int, int]:
    match entry:
        case [str(kind), int(verticals), int(slashes), *_] if (
            kind == KIND and min(verticals, slashes) >= 0
        ):
            return verticals, slashes
    raise ValueError(
        f"DCA's sparse prefill needs a budget of each head, but sparse_attention_config has "
        f'{entry!r} for head {head} of layer {layer}, not ["{KIND}", verticals, slashes, '
        "score]."
    )


def _numbered(given: object, what: str) -> dict[int, object]:
    try:
        match given:
            case list():
                return dict(enumerate(given))
            case dict():
                return {int(number): value for number, value in given.items()}
    except ValueError:
        pass
    raise ValueError(f"DCA: {what} must be a list, or an object by number, not {given!r:.99}.")
