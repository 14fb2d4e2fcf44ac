"""Where the sizes come from, and that what an error proposes works."""

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_dca.method.config import TEMPERATURE_KEY, resolve_settings, validate_options

QWEN = {"chunk_size": 262144, "local_size": 8192, "original_max_position_embeddings": 262144}


def resolve(
    options: dict[str, Any] | None = None,
    checkpoint: dict[str, Any] | None = None,
    window: int = 8192,
    block_size: int = 128,
) -> tuple[int, int, int | None]:
    settings = resolve_settings(validate_options(options or {}), checkpoint, window, block_size)
    return (
        settings.chunk_size,
        settings.local_size,
        settings.original_max_position_embeddings,
    )


@pytest.mark.parametrize(
    ("options", "checkpoint", "expected"),
    [
        (None, None, (6144, 1024, None)),
        (None, QWEN, (262144, 8192, 262144)),
        ({"chunk_size": 4096, "local_size": 512}, QWEN, (4096, 512, 262144)),
        ({"chunk_size": 4096}, QWEN, (4096, 768, 262144)),
        ({"local_size": 256}, None, (6144, 256, None)),
        ({"original_max_position_embeddings": 8192}, None, (6144, 1024, 8192)),
        (
            {"original_max_position_embeddings": 2**31 - 1},
            None,
            (6144, 1024, 2**31 - 1),
        ),
        ({"original_max_position_embeddings": None}, QWEN, (262144, 8192, None)),
        (None, {**QWEN, "original_max_position_embeddings": 0}, (262144, 8192, None)),
        (None, {**QWEN, "sparse_attention_enabled": True}, (262144, 8192, 262144)),
    ],
)
def test_options_override_checkpoint_and_window(
    options: dict[str, Any] | None, checkpoint: dict[str, Any] | None, expected: Any
) -> None:
    assert resolve(options, checkpoint) == expected


def test_a_checkpoint_for_dca_claims_more_than_it_was_trained_on() -> None:
    claimed = 1_010_000
    for options in ({}, {"chunk_size": 4096}):
        settings = resolve_settings(validate_options(options), QWEN, claimed, 128)
        assert settings.window == 262144
    assert resolve_settings({}, None, claimed, 128).window == claimed


@pytest.mark.parametrize(
    ("claimed", "original", "window"), [(400, 200, 200), (400, 50, 100), (150, 200, 150)]
)
def test_the_larger_of_its_sizes_is_what_it_was_trained_on(
    claimed: int, original: int, window: int
) -> None:
    checkpoint = {"chunk_size": 100, "local_size": 36, TEMPERATURE_KEY: original}
    assert resolve_settings({}, checkpoint, claimed, 16).window == window


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk_size": 1024, "local_size": 1024}, "0 < local_size < chunk_size"),
        ({"chunk_size": 1024, "local_size": 2048}, "0 < local_size < chunk_size"),
        ({"chunk_size": 0}, "positive number of tokens, not 0"),
        ({"local_size": -1}, "positive number of tokens, not -1"),
        ({"chunk_size": "1024"}, "positive number of tokens, not '1024'"),
        ({"chunk_size": True}, "positive number of tokens, not True"),
        ({"chunk_size": None}, "positive number of tokens, not None"),
        ({"chunk": 1024}, 'unknown under "dca": chunk. Known: chunk_size, local_size'),
        ({"prefill_provider": 7}, 'prefill_provider must be a name, such as "torch", not 7'),
        (["chunk_size"], "must be an object"),
    ],
)
def test_unusable_options_are_refused(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        resolve(options)


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        ({**QWEN, "chunk_size": -1}, "chunk_size must be a positive number"),
        ({**QWEN, "local_size": 10**30}, "local_size must be 2147483647 tokens at most"),
        (
            {**QWEN, "original_max_position_embeddings": "64"},
            "original_max_position_embeddings must be a positive number of tokens, not '64'",
        ),
        ([64], "dual_chunk_attention_config must be an object, not [64]"),
        (7, "dual_chunk_attention_config must be an object, not 7"),
    ],
)
def test_unusable_checkpoint_values_are_refused(checkpoint: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        resolve(None, checkpoint)


@given(st.integers(2, 5000), st.integers(1, 5000), st.integers(1, 256))
def test_explicit_sizes_work_or_the_error_says_what_does(
    chunk_size: int, local_size: int, block_size: int
) -> None:
    options = {"chunk_size": chunk_size, "local_size": local_size}
    try:
        assert resolve(options, block_size=block_size) == (chunk_size, local_size, None)
    except ValueError as error:
        message = str(error)
        if "0 < local_size < chunk_size" in message:
            assert local_size >= chunk_size
            return
        assert (chunk_size - local_size) % block_size
        for proposed in re.findall(r"--block-size ([\d or]+),", message):
            for size in proposed.split(" or "):
                resolve(options, block_size=int(size))
        for proposed in re.findall(r"such as (\d+)", message):
            resolve({**options, "local_size": int(proposed)}, block_size=block_size)
        assert "--block-size" in message or "local_size" in message


@given(st.integers(4, 200_000), st.sampled_from([1, 8, 16, 48, 128, 256]))
def test_derived_sizes_fit_the_window_and_the_blocks(window: int, block_size: int) -> None:
    try:
        chunk_size, local_size, temperature = resolve(window=window, block_size=block_size)
    except ValueError as error:
        [smaller] = re.findall(r"--block-size (\d+) or smaller", str(error))
        chunk_size, local_size, temperature = resolve(window=window, block_size=int(smaller))
        block_size = int(smaller)
    assert 0 < local_size < chunk_size <= window
    assert (chunk_size - local_size) % block_size == 0
    assert temperature is None


@pytest.mark.parametrize("window", [8192, 10_000, 131_073])
def test_derived_sizes_are_the_same_for_every_usual_block_size(window: int) -> None:
    """Else a page of another size would be another model."""
    sizes = {resolve(window=window, block_size=size) for size in (1, 8, 16, 32, 64, 128)}
    assert len(sizes) == 1
