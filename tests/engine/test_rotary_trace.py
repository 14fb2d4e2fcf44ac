"""What rotates a layer is found in its code, and what is not understood is refused."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import (
    cleanup_dist_env_and_memory,
    ensure_model_parallel_initialized,
    init_distributed_environment,
)
from vllm.model_executor.layers import fused_qk_norm_rope
from vllm.model_executor.layers.linear import QKVParallelLinear
from vllm.model_executor.layers.rotary_embedding import MRotaryEmbedding, RotaryEmbedding
from vllm.model_executor.models import qwen3_next
from vllm.utils.torch_utils import set_default_torch_dtype

from tests.helpers import checkpoints
from vllm_dca.engine import rotary_tables
from vllm_dca.engine.dry_run import NotUnderstoodError
from vllm_dca.engine.remap import remap_layer
from vllm_dca.engine.rotary_check import check_rotation
from vllm_dca.engine.rotary_replacements import RotaryReplacements
from vllm_dca.engine.rotary_trace import rotation_of
from vllm_dca.method.config import resolve_settings
from vllm_dca.method.rotary import QueryRotation, unit_table


@pytest.fixture(autouse=True, scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = tmp_path_factory.mktemp("rank") / "store"
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{store}", 0, "gloo")
        ensure_model_parallel_initialized(1, 1)
        yield
    cleanup_dist_env_and_memory()


class Attention(torch.nn.Module):
    """As much of vLLM's as is called before anything runs."""

    dtype = torch.float32
    head_size = 16

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        raise AssertionError("it is followed, and never run")


class Layer(torch.nn.Module):
    """As vLLM's models write it."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv_proj = QKVParallelLinear(64, 16, 4, 2)
        self.rotary_emb = RotaryEmbedding(16, 16, 128, 1e4, True, torch.float32)
        self.other = RotaryEmbedding(16, 16, 128, 1e6, True, torch.float32)
        self.learned = torch.nn.Embedding(128, 64)
        self.q_norm = torch.nn.RMSNorm(64)
        self.attn = Attention()

    def rotate(self, positions: Any, query: Any, key: Any, qkv: Any) -> Any:
        return self.rotary_emb(positions, query, key)

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        qkv, _ = self.qkv_proj(hidden_states)
        query, key, value = qkv.split([64, 32, 32], dim=-1)
        query, key = self.rotate(positions, self.q_norm(query), key, qkv)
        return self.attn(query, key, value)


class Fused(Layer):
    """A kernel that reads the table, and writes what is split only then."""

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        qkv, _ = self.qkv_proj(hidden_states)
        qkv[:, :16].mul_(self.rotary_emb.cos_sin_cache[positions])
        return self.attn(*qkv.split([64, 32, 32], dim=-1))


class Unrotated(Layer):
    def rotate(self, positions: Any, query: Any, key: Any, qkv: Any) -> Any:
        return query, key


class OnlyQueries(Layer):
    def rotate(self, positions: Any, query: Any, key: Any, qkv: Any) -> Any:
        return self.rotary_emb(positions, query.clone(), key.clone())[0], key.clone()

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        qkv, _ = self.qkv_proj(hidden_states)
        query, key, value = (each.clone() for each in qkv.split([64, 32, 32], dim=-1))
        return self.attn(*self.rotate(positions, query, key, None), value)


class Twice(Layer):
    def rotate(self, positions: Any, query: Any, key: Any, qkv: Any) -> Any:
        return self.other(positions, *self.rotary_emb(positions, query, key))


class Learned(Layer):
    def rotate(self, positions: Any, query: Any, key: Any, qkv: Any) -> Any:
        learned = self.learned(positions)
        return query + learned, key + learned[:, :32]


class Silent(Layer):
    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states


class Strange(Layer):
    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, phase_of_the_moon: float
    ) -> torch.Tensor:
        return super().forward(positions, hidden_states)


def model_of(layer: Layer) -> torch.nn.Module:
    return torch.nn.ModuleDict({"self_attn": layer})


@pytest.mark.parametrize("kind", [Layer, Fused])
def test_the_module_is_found_by_its_table(kind: type[Layer]) -> None:
    layer = kind()
    before = {name: each.data_ptr() for name, each in layer.named_buffers()}
    rotation = rotation_of("self_attn.attn", model_of(layer))
    assert rotation is not None
    assert rotation.rotary is layer.rotary_emb
    assert rotation.places == [(layer, "rotary_emb")]
    # Nothing is left behind.
    assert {name: each.data_ptr() for name, each in layer.named_buffers()} == before
    assert "forward" not in vars(layer.attn)
    assert "forward" not in vars(layer.qkv_proj)


def test_a_module_that_is_there_but_not_used_does_not_count() -> None:
    assert rotation_of("self_attn.attn", model_of(Unrotated())) is None


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (OnlyQueries, "its queries and keys are not rotated alike"),
        (Twice, "rotated by several modules, RotaryEmbedding, RotaryEmbedding"),
        (Learned, "positions reach its queries through no rotary module"),
        (Silent, "its Silent never calls it"),
        (Strange, "its Strange takes a phase_of_the_moon"),
    ],
)
def test_what_is_half_understood_is_refused(kind: type[Layer], reason: str) -> None:
    with pytest.raises(NotUnderstoodError, match=reason):
        rotation_of("self_attn.attn", model_of(kind()))


class Normed(Layer):
    """A norm after the rotation weighs entries that the rotation mixed."""

    def rotate(self, positions: Any, query: Any, key: Any, qkv: Any) -> Any:
        query, key = self.rotary_emb(positions, query, key)
        return self.q_norm(query), key


class Tail(Layer):
    """As models with latent attention: the last entries of a head are rotated."""

    def rotate(self, positions: Any, query: Any, key: Any, qkv: Any) -> Any:
        query, key = (each.unflatten(-1, (-1, 16)).flip(-1) for each in (query, key))
        rotated = self.rotary_emb(positions, query.flatten(1), key.flatten(1))
        return tuple(each.unflatten(-1, (-1, 16)).flip(-1).flatten(1) for each in rotated)


class Scaled(Layer):
    """A factor that is one number for a token, such as a temperature, commutes with turns."""

    def rotate(self, positions: Any, query: Any, key: Any, qkv: Any) -> Any:
        query, key = self.rotary_emb(positions, query, key)
        return query * (1 + positions // 100)[:, None], key


def rotation_in(layer: Layer) -> QueryRotation:
    return QueryRotation(unit_table(layer.rotary_emb.cos_sin_cache, 96), True)


@pytest.mark.parametrize("kind", [Layer, Scaled])
def test_queries_that_turn_as_the_table_says(kind: type[Layer]) -> None:
    layer = kind()
    check_rotation("self_attn.attn", model_of(layer), rotation_in(layer), 64)


@pytest.mark.parametrize("kind", [Normed, Tail, Fused])
def test_queries_that_do_not(kind: type[Layer]) -> None:
    layer = kind()
    with pytest.raises(NotUnderstoodError, match="do not turn with their positions"):
        check_rotation("self_attn.attn", model_of(layer), rotation_in(layer), 64)


class Hidden(Layer):
    """By what does nothing to tensors without data, as an operator's fake may."""

    heads = (0, 1)

    def rotate(self, positions: Any, query: Any, key: Any, qkv: Any) -> Any:
        if query.is_meta:
            return query, key
        rotated = self.rotary_emb(positions, query.clone(), key.clone())
        return tuple((rotated if i in self.heads else (query, key))[i] for i in (0, 1))


class HiddenForKeys(Hidden):
    heads = (1,)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [(Unrotated, None), (Hidden, "its queries depend"), (HiddenForKeys, "its keys depend")],
)
def test_what_no_module_was_seen_to_rotate_stays_as_it_is(
    kind: type[Layer], reason: str | None
) -> None:
    model = model_of(kind())
    found = rotation_of("self_attn.attn", model)
    assert found is None
    settings = resolve_settings({"chunk_size": 96, "local_size": 32}, None, 128, 16)
    config = VllmConfig(additional_config={"dca": settings.to_dict()})
    given = ("self_attn.attn", found, model, config, RotaryReplacements(settings, 128))
    if reason is None:
        assert remap_layer(*given).cos_sin.unique(dim=0).tolist() == [[1, 0]]
    else:
        message = f"{reason} on their positions, by code that cannot be followed"
        with pytest.raises(NotImplementedError, match=message):
            remap_layer(*given)


@triton.jit
def _turn(query, key, cos_sin, positions, query_row, key_row, num_heads, half: tl.constexpr):
    token, head, pair = tl.program_id(0), tl.program_id(1), tl.arange(0, half)
    if head < num_heads:
        at = query + token * query_row + head * 2 * half + pair
    else:
        at = key + token * key_row + (head - num_heads) * 2 * half + pair
    row = cos_sin + tl.load(positions + token) * 2 * half + pair
    cos, sin = tl.load(row), tl.load(row + half)
    x, y = tl.load(at), tl.load(at + half)
    tl.store(at, x * cos - y * sin)
    tl.store(at + half, y * cos + x * sin)


class Launching(Layer):
    """Rotates by a kernel that torch's dispatch never sees."""

    heads = 4 + 2

    def rotate(self, positions: Any, query: Any, key: Any, qkv: Any) -> Any:
        _turn[(len(query), self.heads)](
            query, key, self.table(), positions, query.stride(0), key.stride(0), 4, 8
        )
        return query, key

    def table(self) -> torch.Tensor:
        return self.rotary_emb.cos_sin_cache


class LaunchingForHalf(Launching):
    """Of keys it would be thought too that it rotates them."""

    heads = 4


class LaunchingWithoutTable(Launching):
    def table(self) -> torch.Tensor:
        return self.learned.weight


def test_a_kernel_of_triton_is_not_launched_on_tensors_without_data() -> None:
    """Nor is what it might have written lost; afterwards it is."""
    layer = Launching()
    rotation = rotation_of("self_attn.attn", model_of(layer))
    assert rotation is not None
    assert rotation.rotary is layer.rotary_emb
    check_rotation("self_attn.attn", model_of(layer), rotation_in(layer), 64)
    half = LaunchingForHalf()
    with pytest.raises(NotUnderstoodError, match="its keys do not turn with their positions"):
        check_rotation("self_attn.attn", model_of(half), rotation_in(half), 64)
    with pytest.raises(NotUnderstoodError, match="through no rotary module"):
        rotation_of("self_attn.attn", model_of(LaunchingWithoutTable()))


@pytest.mark.each_minor
@pytest.mark.parametrize("scaling", ["none", "M-RoPE"])
def test_qwen3_next_s_kernel_for_gpus(scaling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It norms and rotates by one launch, from the table that the module has by then."""
    kernel = fused_qk_norm_rope._fused_qk_rmsnorm_rope_gate_kernel
    monkeypatch.setattr(fused_qk_norm_rope, "triton", triton)
    monkeypatch.setattr(fused_qk_norm_rope, "tl", tl)
    monkeypatch.setattr(
        fused_qk_norm_rope, "_fused_qk_rmsnorm_rope_gate_kernel", triton.jit(kernel)
    )
    changes: dict[str, Any] = dict(checkpoints.QWEN3_NEXT, partial_rotary_factor=0.5)
    if scaling == "M-RoPE":
        sections = {"mrope_section": [6, 5, 5], "mrope_interleaved": True}
        changes["rope_parameters"] = {**sections, "rope_type": "default", "rope_theta": 1e4}
    attention = Attention()
    attention.dtype, attention.head_size = torch.bfloat16, changes["head_dim"]
    monkeypatch.setattr(qwen3_next, "Attention", lambda *args, **kwargs: attention)
    with set_default_torch_dtype(torch.bfloat16):
        config = checkpoints.config("Qwen3NextConfig", **changes)
        layer = qwen3_next.Qwen3NextAttention(config, prefix=f"layers.0.{scaling}")
    model = torch.nn.ModuleDict({"self_attn": layer})
    assert not layer.use_fused_qk_norm_rope_gate
    layer.use_fused_qk_norm_rope_gate = True
    rotation = rotation_of("self_attn.attn", model)
    assert rotation is not None
    assert rotation.rotary is layer.rotary_emb
    replacement, turns = rotary_tables.periodic(layer.rotary_emb, 96, 64, 256)
    layer.rotary_emb = replacement
    check_rotation("self_attn.attn", model, turns, 64)


def fails(*args: Any) -> Any:
    raise AssertionError("it has no data")


def test_vllm_s_modules_go_by_their_native_forwards() -> None:
    """As of a GPU without torch.compile: M-RoPE's calls another module that calls a kernel."""
    layer: Any = Layer()
    layer.rotary_emb = MRotaryEmbedding(16, 16, 128, 1e4, True, torch.float32, [2, 3, 3])
    layer.rotary_emb._forward_method = layer.rotary_emb.forward_cuda
    layer.rotary_emb.apply_rotary_emb._forward_method = fails
    rotation = rotation_of("self_attn.attn", model_of(layer))
    assert rotation is not None
    assert rotation.rotary is layer.rotary_emb
    assert layer.rotary_emb._forward_method == layer.rotary_emb.forward_cuda
