"""The attention function against the reference, over batches of every shape."""

import dataclasses
import functools
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from scripts.bench.layer import Layer
from tests.helpers.cases import cases
from tests.helpers.paged import CPU_OPERATIONS, CPU_PREFILL, Batch, Shape
from tests.helpers.shapes import DTYPES, shapes
from vllm_dca.cpu import compiled, plan_decode
from vllm_dca.method.kv_cache import write_kv
from vllm_dca.method.prefill import by_passes
from vllm_dca.method.rotary import QueryRotation

# Its scores are larger than those of the batches that its tolerance was once asked of.
LARGE_SCORES = Shape(
    [(15, 1), (63, 14), (16, 0)],
    *(48, 12, 16),
    num_kv_heads=1,
    group=4,
    is_neox=False,
    original_max_position_embeddings=1,
    seed=223,
)

# Gemma's heads have 256 entries.
SHAPES = st.booleans().flatmap(
    lambda decode: shapes(decode, softmax=True, head_sizes=(8, 16, 40, 256))
)


@settings(max_examples=cases(200), deadline=None)
@given(
    SHAPES,
    st.booleans(),
    st.sampled_from([1 << 22, 2000, 100]),
)
@example(LARGE_SCORES, False, 1 << 22)
def test_every_path_agrees_with_reference(
    shape: Shape, tokens_first: bool, workspace: int
) -> None:
    """Compiled, and in torch by passes and by pages, of which few fit a small workspace."""
    batch = Batch.random(dataclasses.replace(shape, tokens_first=tokens_first))
    batch.assert_close(batch.compiled())
    batch.assert_close(batch.prefill())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_decode, "WORKSPACE_ELEMENTS", workspace)
        batch.assert_close(batch.decode())


@pytest.mark.parametrize(
    ("group", "head_size", "dtype", "tokens_first"),
    [
        (1, 64, torch.float32, False),
        (3, 64, torch.float16, True),
        (4, 128, torch.bfloat16, False),
        (9, 80, torch.float32, True),
    ],
)
def test_compiled_takes_many_tiles_splits_and_panels(
    group: int, head_size: int, dtype: torch.dtype, tokens_first: bool
) -> None:
    """More rows than a tile has, more keys than a split."""
    sizes = {"group": group, "head_size": head_size, "rotary_dim": head_size, "dtype": dtype}
    lengths = [(900, 0), (1500, 1499), (1100, 1098), (300, 0)]
    # The same twice, with and without what few models have.
    for softmax in ({}, {"soft_cap": 5.0, "has_sinks": True}):
        shape = Shape(lengths, 512, 128, 64, tokens_first=tokens_first, **sizes, **softmax)
        batch = Batch.random(shape)
        batch.assert_close(batch.compiled())


def apart(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """The same, its rows as far apart as those of so many heads; between them is NaN."""
    rows, own, size = tensor.shape
    wide = torch.full([rows, heads, size], torch.nan, dtype=tensor.dtype)
    wide[:, :own] = tensor
    return wide[:, :own]


def test_layers_of_a_step_share_its_plan() -> None:
    """Each differs from the first in one thing of all in which layers of one plan can."""
    shape = Shape([(70, 0), (90, 88)], 32, 16, 8, rotary_dim=16, head_size=16)
    # And how many heads apart the rows of queries and of outputs are: the first has six heads.
    layers: list[tuple[dict[str, Any], int, int]] = [({}, 6, 6), ({}, 7, 6), ({}, 6, 7)]
    differences: list[dict[str, Any]] = [
        *({"group": 2}, {"soft_cap": 1.0}, {"has_sinks": True}, {"is_neox": False}),
        *({"rotary_dim": 8}, {"rope_base": 1e3}, {"mscale": 1.2}, {"sharpness": 2.0}),
        *({"tokens_first": True}, {"head_size": 32}, {}),
    ]
    layers += [(difference, 6, 6) for difference in differences]
    plans: list[compiled.CompiledPlan] = []

    def shared(*arguments: Any) -> compiled.CompiledPlan:
        if not plans:
            plans.append(compiled.CompiledPlan(*arguments))
        assert torch.equal(arguments[2], plans[0].block_table)
        return plans[0]

    tables: dict[tuple[float, int], torch.Tensor] = {}  # as a model's layers share them
    for difference, query_heads, output_heads in layers:
        layer = Batch.random(dataclasses.replace(shape, **difference))
        kind = layer.shape.rope_base, layer.shape.rotary_dim
        table = tables.setdefault(kind, layer.rotation().cos_sin)
        layer.rotation = functools.partial(QueryRotation, table, layer.shape.is_neox)
        query = apart(layer.rotated_query(), query_heads)
        output = apart(torch.full_like(query, torch.nan), output_heads)
        layer.assert_close(layer.compiled(query, plan=shared, output=output))


@pytest.mark.parametrize(("group", "lengths"), [(20, (3000, 2999)), (9, (5000, 4998))])
def test_compiled_takes_panels_in_splits(group: int, lengths: tuple[int, int]) -> None:
    """More queries than lie along a head's entries, and keys for several splits."""
    sizes = {"num_kv_heads": 1, "group": group, "head_size": 16, "rotary_dim": 16}
    batch = Batch.random(Shape([lengths, (30, 29)], 2048, 128, block_size=64, **sizes))
    batch.assert_close(batch.compiled())


def test_compiled_split_of_which_a_row_sees_nothing() -> None:
    """A split begins at 4,096: it holds the second row's key only."""
    sizes = {"num_kv_heads": 1, "group": 1, "head_size": 16, "rotary_dim": 16}
    batch = Batch.random(Shape([(4097, 4095)], 2048, 128, block_size=64, **sizes))
    batch.assert_close(batch.compiled())


def test_compiled_splits_grow_with_the_keys() -> None:
    """Eight splits of 2,048 keys and a rest; checked row by row, as what is timed is."""
    layer = Layer(("long", 3, 1, 16, 2048, 512), 2, 16600, 2, torch.float32, 64, "cpu")
    layer.output.fill_(torch.nan)
    plan = compiled.CompiledPlan(
        layer.starts, layer.seq_lens, layer.block_table, layer.page, layer.geometry
    )
    compiled.attention(
        layer.query,
        layer.kv_cache,
        layer.output,
        plan=plan,
        rotation=layer.rotation,
        softmax_scale=layer.scale,
    )
    layer.check()


@pytest.fixture(scope="module")
def libraries() -> dict[str, Any]:
    return {name: compiled.library(name) for name in compiled.instruction_sets()}


@pytest.mark.parametrize("instructions", compiled.WITHOUT_BEYOND)
@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled_for_each_instruction_set(
    instructions: str,
    dtype: torch.dtype,
    libraries: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Prefills in panels, decodes in place and copied, more keys than are taken at a time."""
    if instructions not in libraries:
        pytest.skip(f"this processor has no {instructions}")
    monkeypatch.setattr(compiled, "library", lambda: libraries[instructions])
    assert compiled.instructions() == instructions
    for group, head_size in ((1, 64), (3, 40), (9, 128), (2, 256), (1, 512)):
        sizes = {"group": group, "head_size": head_size, "rotary_dim": head_size}
        lengths = [(300, 0), (290, 283), (260, 259), (47, 46)]
        shape = Shape(lengths, 128, 32, block_size=32, num_kv_heads=1, dtype=dtype, **sizes)
        batch = Batch.random(shape)
        batch.assert_close(batch.compiled())


def test_instruction_sets_are_those_that_torch_may_use() -> None:
    """ATEN_CPU_CAPABILITY lowers both."""
    if "AVX2" not in compiled.instruction_sets():
        pytest.skip("there is none to leave out")
    code = "from vllm_dca.cpu import compiled; print(*compiled.instruction_sets())"
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "avx2"}
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["AVX2", "baseline"]


@pytest.mark.parametrize(
    ("cpu_name", "expected"),
    [("AMD Zen 4", "AVX512_BF16"), ("Intel Xeon", "AVX512"), (None, "AVX512_BF16")],
)
def test_pairs_of_bfloat16_are_for_processors_that_are_fast_in_them(
    cpu_name: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    has = {"avx512_bf16": True, "cpu_name": cpu_name}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert compiled.fastest() == expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens_first", [False, True])
@pytest.mark.parametrize("num_tokens", [0, 1, 700])
def test_compiled_stores_as_torch_does(
    dtype: torch.dtype, tokens_first: bool, num_tokens: int
) -> None:
    """Any order in memory, keys and values that lie in a wider tensor, padding at the end."""
    blocks, heads, block_size, head_size = 100, 3, 12, 40
    size = [blocks, block_size, heads] if tokens_first else [blocks, heads, block_size]
    empty = torch.full([*size, 2 * head_size], torch.nan, dtype=dtype)
    wide = torch.randn(num_tokens + 2, heads, 3 * head_size).to(dtype)
    key, value = wide[..., :head_size], wide[..., head_size : 2 * head_size]
    slots = torch.randperm(blocks * block_size)[: num_tokens + 1]
    slots[num_tokens // 2 :: 3] = -1
    stored = []
    for write in (write_kv, compiled.write_kv):
        cache = empty.clone()
        write(key, value, cache.transpose(1, 2) if tokens_first else cache, slots)
        stored.append(cache)
    torch.testing.assert_close(*stored, rtol=0, atol=0, equal_nan=True)
    assert stored[0].isfinite().any() == (num_tokens > 0)


def test_a_prefill_takes_no_more_room_than_it_says() -> None:
    """vLLM sizes the KV cache by it."""
    # A temperature turns the queries of all three passes, nearly all of which see all regions.
    shape = Shape(
        [(2000, 32)],
        head_size=64,
        rotary_dim=64,
        original_max_position_embeddings=16,
        dtype=torch.bfloat16,
    )
    taken = []

    def turn(*args: Any) -> torch.Tensor:
        taken.append(turned := CPU_OPERATIONS.turn(*args))
        return turned

    def merge(output: torch.Tensor, lse: torch.Tensor, parts: list[Any], sinks: Any) -> None:
        taken.extend([lse, *(each for part in parts for each in (part.output, part.lse))])
        CPU_OPERATIONS.merge(output, lse, parts, sinks)

    batch = Batch.random(shape)
    batch.prefill(by=by_passes(CPU_OPERATIONS._replace(turn=turn, merge=merge)))
    tensors = sum(each.nbytes for each in taken) / batch.rotated_query().nbytes
    # The last one is for log-sum-exps, which are less.
    assert CPU_PREFILL.room - 1 < tensors <= CPU_PREFILL.room


@pytest.mark.parametrize("dtype", DTYPES)
def test_below_one_chunk_dca_is_ordinary_attention(dtype: torch.dtype) -> None:
    shape = Shape([(16, 0)], dtype=dtype)
    batch = Batch.random(shape)
    query = batch.rotated_query().transpose(0, 1)
    key, value = (
        batch.kv_cache[batch.block_table[0].long()].transpose(0, 1).flatten(1, 2).chunk(2, -1)
    )
    op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    # The provider gives torch fp32 but where the processor has half precision's tiles.
    wide = dtype if torch.cpu._is_amx_tile_supported() else torch.float32
    query, key, value = (tensor[None].to(wide) for tensor in (query, key, value))
    ordinary, _ = op(query, key, value, 0.0, True, scale=shape.scale)
    ordinary = ordinary[0].transpose(0, 1).to(dtype)
    torch.testing.assert_close(batch.prefill(), ordinary, rtol=0, atol=0)
    assert (batch.compiled() - ordinary).abs().max() <= batch.tolerance


def test_tolerance_would_catch_a_wrong_region() -> None:
    """The check can fail: one position too few towards the previous chunk is seen."""
    batch = Batch.random(Shape([(100, 0)]))
    wrong = dataclasses.replace(
        batch, shape=dataclasses.replace(batch.shape, local_size=batch.shape.local_size - 1)
    )
    for output in (wrong.prefill(), wrong.compiled()):
        assert (output.double() - batch.exact).abs().max() > 100 * batch.tolerance
