"""Where the chunk sizes come from, and what makes a set of them usable.

The one home of DCA's options and defaults. Knows nothing of vLLM: it is given dictionaries
and numbers, and answers with settings or a ValueError that says what would work.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from vllm_dca.method.geometry import ChunkGeometry
from vllm_dca.method.options import token_count
from vllm_dca.method.sparse_config import SPARSE_KEYS, SparseSettings, validate_sparse_options

SIZE_KEYS = ("chunk_size", "local_size")
TEMPERATURE_KEY = "original_max_position_embeddings"
PROVIDER_KEY = "prefill_provider"
OPTION_KEYS = (*SIZE_KEYS, TEMPERATURE_KEY, PROVIDER_KEY, *SPARSE_KEYS)

# The authors' ChunkLlama: chunk_size = 3/4 and local_size = 1/8 of the trained window, which
# is 1/6 of the chunk_size.
CHUNK_SIZE_OF_WINDOW = (3, 4)
LOCAL_SIZE_OF_CHUNK = (1, 6)
# Derived chunk lengths are multiples of this if the window is long enough, so that they are
# the same for every usual block size.
CHUNK_LEN_ALIGNMENT = 128

_NAMED_BLOCK_SIZES = tuple(2**n for n in range(12))


@dataclass(frozen=True)
class DcaSettings:
    """Resolved settings.

    Attributes:
        chunk_size: c, tokens.
        local_size: w, tokens.
        original_max_position_embeddings: length from which the temperature grows, tokens;
            None for no temperature.
        source: where the sizes came from, for people to read.
        window: what the model was trained on, tokens.
        prefill_provider: who computes the prefill's passes, see `vllm_dca.engine.providers`;
            None for the first that can.
        sparse: of sparse prefill; None if all attention is dense.
    """

    chunk_size: int
    local_size: int
    original_max_position_embeddings: int | None
    source: str
    window: int
    prefill_provider: str | None = None
    sparse: SparseSettings | None = None

    @property
    def geometry(self) -> ChunkGeometry:
        """The sizes alone."""
        return ChunkGeometry(self.chunk_size, self.local_size)

    def to_dict(self) -> dict[str, Any]:
        """The form in which vLLM's additional config carries it to every process."""
        return asdict(self)

    @classmethod
    def of_dict(cls, carried: Mapping[str, Any]) -> "DcaSettings":
        """From what `to_dict` made."""
        sparse = carried["sparse"]
        return cls(
            **{**carried, "sparse": None if sparse is None else SparseSettings(**sparse)}
        )


def validate_options(options: object) -> dict[str, Any]:
    """Check what the user put under "dca" in --additional-config.

    Raises:
        ValueError: unknown keys, or unusable values.
    """
    if not isinstance(options, Mapping):
        raise ValueError(
            f'--additional-config: "dca" must be an object such as {{"chunk_size": 6144}}, '
            f"not {options!r}."
        )
    unknown = sorted(set(options) - set(OPTION_KEYS))
    if unknown:
        raise ValueError(
            f'--additional-config: unknown under "dca": {", ".join(map(str, unknown))}. '
            f"Known: {', '.join(OPTION_KEYS)}."
        )
    sizes: dict[str, int | None] = {
        key: token_count(key, options[key]) for key in SIZE_KEYS if key in options
    }
    if TEMPERATURE_KEY in options:
        sizes[TEMPERATURE_KEY] = _temperature(options[TEMPERATURE_KEY])
    provider = options.get(PROVIDER_KEY)
    if not isinstance(provider, str | None):
        raise ValueError(
            f'DCA\'s {PROVIDER_KEY} must be a name, such as "torch", not {provider!r}. Left '
            "out, DCA chooses one."
        )
    return {**sizes, PROVIDER_KEY: provider, **validate_sparse_options(options)}


def _temperature(value: object) -> int | None:
    return None if value is None else token_count(TEMPERATURE_KEY, value)


def resolve_settings(
    options: Mapping[str, Any],
    checkpoint: Mapping[str, Any] | None,
    window: int,
    block_size: int,
) -> DcaSettings:
    """Settle the sizes: the user's, else the checkpoint's, else from the trained window.

    If the user names chunk_size or local_size, the checkpoint's values of both are ignored,
    and a local_size that is left out is derived.

    Args:
        options: as `validate_options` returns them.
        checkpoint: the checkpoint's dual_chunk_attention_config, if it has one.
        window: the longest context that the model takes without DCA, tokens; a checkpoint made
            for DCA claims what it reaches with it, and was trained on what its sizes say.
        block_size: tokens in a page of the KV cache.

    Raises:
        ValueError: what is no number of tokens; sizes that cannot work together or with the
            block size.
    """
    checkpoint = checkpoint or {}
    if not isinstance(checkpoint, Mapping):
        raise ValueError(
            "DCA: the checkpoint's dual_chunk_attention_config must be an object, not "
            f"{checkpoint!r:.99}."
        )
    named = {key: token_count(key, checkpoint[key]) for key in SIZE_KEYS if key in checkpoint}
    # Qwen's configs and vLLM V0 both write 0 for "no temperature".
    temperature = checkpoint.get(TEMPERATURE_KEY)
    temperature = None if temperature == 0 else _temperature(temperature)
    if trained := named.get("chunk_size"):
        window = min(window, max(trained, temperature or 0))
    source = "the checkpoint's dual_chunk_attention_config"
    if any(key in options for key in SIZE_KEYS):
        named = {key: options[key] for key in SIZE_KEYS if key in options}
        source = "--additional-config"
    if not named:
        source = f"derived from the trained window of {window} tokens"

    chunk_size = named.get("chunk_size") or _fraction(window, CHUNK_SIZE_OF_WINDOW)
    local_size = named.get("local_size") or _derive_local_size(chunk_size, block_size)
    geometry = ChunkGeometry(chunk_size, local_size)
    _check_block_size(geometry, block_size)

    if TEMPERATURE_KEY in options:
        temperature = options[TEMPERATURE_KEY]
    provider = options.get(PROVIDER_KEY)
    return DcaSettings(chunk_size, local_size, temperature, source, window, provider)


def _fraction(of: int, fraction: tuple[int, int]) -> int:
    return of * fraction[0] // fraction[1]


def _derive_local_size(chunk_size: int, block_size: int) -> int:
    """The chunk length rounded down to whole blocks; the rest of the chunk is local."""
    chunk_len = chunk_size - max(_fraction(chunk_size, LOCAL_SIZE_OF_CHUNK), 1)
    alignment = math.lcm(block_size, CHUNK_LEN_ALIGNMENT)
    if chunk_len < alignment:
        alignment = block_size
    if chunk_len < alignment:
        raise ValueError(
            f"DCA: a chunk_size of {chunk_size} tokens leaves no room for a chunk of whole "
            f"KV-cache blocks of {block_size} tokens. Pass --block-size "
            f"{max(b for b in _NAMED_BLOCK_SIZES if b <= max(chunk_len, 1))} or smaller."
        )
    return chunk_size - chunk_len // alignment * alignment


def _check_block_size(geometry: ChunkGeometry, block_size: int) -> None:
    chunk_len = geometry.chunk_len
    if chunk_len % block_size == 0:
        return
    working = [b for b in _NAMED_BLOCK_SIZES if b > 1 and chunk_len % b == 0]
    remedy = f"choose a chunk_size over {block_size}"
    if geometry.chunk_size > block_size:
        fitting = geometry.chunk_size - max(chunk_len // block_size, 1) * block_size
        remedy = f"choose a local_size that leaves a multiple, such as {fitting}"
    if working:
        remedy = f"pass --block-size {' or '.join(map(str, working))}, or {remedy}"
    raise ValueError(
        f"DCA needs a chunk length that is a multiple of the KV-cache block size, but "
        f"chunk_size {geometry.chunk_size} - local_size {geometry.local_size} = {chunk_len} "
        f"is not one of {block_size}: {remedy}."
    )
