"""Attention providers for CUDA: what they are called with, and which is chosen."""

import dataclasses
import functools
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from triton import knobs

from tests.helpers.paged import Batch, Shape
from vllm_dca.cpu import paged_pass
from vllm_dca.cpu.merge import merge_parts
from vllm_dca.cuda import flash_attn
from vllm_dca.cuda.decode import decode_attention
from vllm_dca.cuda.device import WALK, storing_by
from vllm_dca.engine import devices
from vllm_dca.engine.providers import PROVIDERS, choose
from vllm_dca.method.device import PrefillOperations
from vllm_dca.method.prefill import by_passes
from vllm_dca.method.provider import (
    Needs,
    PagedSegments,
    UnusableProviderError,
)
from vllm_dca.method.rotary import turn_queries

NEEDS = Needs(128, torch.bfloat16, torch.bfloat16, 256, (9, 0))


@functools.cache
def bundled_interface() -> ModuleType:
    """vLLM's own file; its package refuses to be imported where there is no CUDA."""
    [vllm] = importlib.util.find_spec("vllm").submodule_search_locations
    path = Path(vllm) / "vllm_flash_attn" / "flash_attn_interface.py"
    spec = importlib.util.spec_from_file_location("flash_attn_interface", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def package_signature(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
    softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False, block_table=None,
) -> None:  # type: ignore[no-untyped-def]  # fmt: skip
    """What flash_attn.flash_attn_varlen_func takes in 2.7 and 2.8; it ships as source only."""


def stand_in(
    signature: inspect.Signature, calls: list[dict[str, Any]], version: int
) -> Callable[..., Any]:
    """flash-attention as its signature and its documentation have it, on torch's attention."""

    def flash_attn_varlen_func(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        bound = signature.bind(*args, **kwargs)
        call = bound.arguments
        calls.append(call)
        lengths_q = call["cu_seqlens_q"].diff()
        paged = "seqused_k" in signature.parameters
        lengths_k = call["seqused_k"] if paged else call["cu_seqlens_k"].diff()
        assert call["max_seqlen_q"] >= lengths_q.max()
        assert call["max_seqlen_k"] >= lengths_k.max()
        output = call.get("out")
        if output is None:
            output = torch.empty_like(call["q"])
        lse = paged_pass.attention(
            call["q"],
            call["k"],
            call["v"],
            output,
            segments=PagedSegments(
                lengths_q.numpy(),
                lengths_k.numpy(),
                call["cu_seqlens_q"],
                None,
                lengths_k,
                call["block_table"],
                call["causal"],
            ),
            softmax_scale=call["softmax_scale"],
            soft_cap=call["softcap"] or None,
        )
        if version == 2 and call["max_seqlen_q"] == 1:
            # Query heads of a KV head are its queries then, and come last.
            by_group = lse.unflatten(0, (call["k"].shape[2], -1))
            lse = by_group.transpose(1, 2).reshape(lse.shape)
        return (output, lse) if paged else (output, lse, None)

    return flash_attn_varlen_func


def attending_by(name: str, calls: list[dict[str, Any]], version: int) -> Callable[..., Any]:
    """A provider on a stand-in; the package is version 2 in any case."""
    if name == "flash_attn":
        function = stand_in(inspect.signature(package_signature), calls, 2)
        return functools.partial(flash_attn._package, function)
    signature = inspect.signature(bundled_interface().flash_attn_varlen_func)
    return functools.partial(
        flash_attn._bundled, stand_in(signature, calls, version), version, 1
    )


@pytest.mark.parametrize("softmax", [{}, {"soft_cap": 2.0, "has_sinks": True}])
@pytest.mark.parametrize("name", ["vllm_flash_attn", "flash_attn"])
def test_flash_attention_is_called_as_it_wants(name: str, softmax: dict[str, Any]) -> None:
    """With arguments that it has, by batches that the reference answers."""
    calls: list[dict[str, Any]] = []
    shape = Shape([(70, 20), (16, 0), (33, 32)], dtype=torch.bfloat16, **softmax)
    batch = Batch.random(shape)
    operations = PrefillOperations(turn_queries, attending_by(name, calls, 3), merge_parts)
    batch.assert_close(batch.prefill(by=by_passes(operations)))
    assert [call["causal"] for call in calls] == [True, False, False]
    for call in calls:
        assert call["softcap"] == softmax.get("soft_cap", 0.0)
        # The merge adds them, once.
        assert "s_aux" not in call
        assert call["cu_seqlens_q"].dtype == call["block_table"].dtype == torch.int32
        assert call["block_table"].stride(-1) == 1
        assert call["k"].stride(-1) == call["v"].stride(-1) == 1
        # Both take cu_seqlens_k or seqused_k, never both.
        if name == "vllm_flash_attn":
            assert call["seqused_k"].dtype == torch.int32
            assert "cu_seqlens_k" not in call
            assert call["return_softmax_lse"]
            # On a card of one multiprocessor, which few queries fill.
            assert call["num_splits"] == flash_attn.num_splits(3, *call["q"].shape[:2], 1)
        else:
            assert call["return_attn_probs"]


@pytest.mark.parametrize("name", ["vllm_flash_attn", "flash_attn"])
def test_one_token_of_each_request_is_merged_in_its_order(name: str) -> None:
    """Version 2 lays log-sum-exps out in another order where it is told of one query each."""
    batch = Batch.random(Shape([(70, 69), (49, 48), (33, 32)], dtype=torch.bfloat16))
    operations = PrefillOperations(turn_queries, attending_by(name, [], 2), merge_parts)
    batch.assert_close(batch.prefill(by=by_passes(operations)))


@pytest.mark.parametrize(
    ("num_queries", "num_heads", "num_multiprocessors", "splits"),
    [
        (32_768, 28, 132, 1),  # a step of a long prompt
        (1_057, 32, 132, 1),
        (1_055, 32, 132, 0),  # 131 and a bit of the largest tiles: some multiprocessors idle
        (16, 32, 132, 0),
        (1_056, 32, 108, 1),
        (863, 32, 108, 0),
    ],
)
def test_keys_are_not_split_where_queries_fill_the_card(
    num_queries: int, num_heads: int, num_multiprocessors: int, splits: int
) -> None:
    given = num_queries, num_heads, num_multiprocessors
    assert flash_attn.num_splits(3, *given) == splits
    # It would be compiled for numbers of parts that no warm-up has met.
    assert flash_attn.num_splits(4, *given) == 1


def test_the_kernel_that_stores_keys_is_called_as_it_wants() -> None:
    """Keys and values are in their slots afterwards, each over its own scale."""
    from vllm._custom_ops import reshape_and_cache_flash

    names = "key value key_cache value_cache slot_mapping kv_cache_dtype k_scale v_scale"
    assert list(inspect.signature(reshape_and_cache_flash).parameters) == names.split()
    dtypes = []

    def stand_in(key, value, key_cache, value_cache, slots, dtype, k_scale, v_scale):  # type: ignore[no-untyped-def]
        dtypes.append(dtype)
        for slot, token in zip(slots.tolist(), zip(key, value, strict=True), strict=True):
            at = divmod(slot, key_cache.shape[1])
            key_cache[at], value_cache[at] = token[0] / k_scale, token[1] / v_scale

    key, value = torch.randn(2, 3, 2, 8)
    kv_cache = torch.full((5, 2, 4, 16), torch.nan)
    slots = torch.tensor([6, 7, 12])
    scales = torch.tensor([0.5]), torch.tensor([4.0])
    storing_by(stand_in)(key, value, kv_cache, slots, "fp8_e5m2", *scales)
    for token, (page, offset) in enumerate([(1, 2), (1, 3), (3, 0)]):
        stored = torch.cat([2 * key[token], value[token] / 4], dim=-1)
        assert torch.equal(kv_cache[page, :, offset], stored)
    assert kv_cache.isfinite().sum() == 3 * 2 * 16
    assert dtypes == ["fp8_e5m2"]


def unusable(reason: str) -> Callable[[Needs], Any]:
    def load(needs: Needs) -> Any:
        raise UnusableProviderError(reason)

    return load


def test_the_first_that_can_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(PROVIDERS["cuda"]) == [
        *("vllm_flash_attn", "flash_attn", "xformers"),
        *("triton", "triton_passes"),
    ]
    assert choose("cpu", None, NEEDS)[0] == "compiled"
    # Without vLLM's CUDA build, the flash-attn package, and a GPU for xformers.
    assert choose("cuda", None, NEEDS)[0] == "triton"
    for name in ("vllm_flash_attn", "flash_attn", "xformers"):
        with pytest.raises(ValueError, match=rf"no attention provider.*{name}: "):
            choose("cuda", name, NEEDS)
    with pytest.raises(
        ValueError, match=r"'flashinfer' is not known.*vllm_flash_attn, flash_attn"
    ):
        choose("cuda", "flashinfer", NEEDS)
    assert choose("cuda", "triton_passes", NEEDS)[0] == "triton_passes"
    blackwell = dataclasses.replace(NEEDS, capability=(10, 0))
    assert choose("cuda", None, blackwell)[0] == "triton_passes"
    assert choose("cuda", "triton", blackwell)[0] == "triton"
    for name in ("triton", "triton_passes"):
        monkeypatch.setitem(PROVIDERS["cuda"], name, unusable("no Triton"))
    with pytest.raises(
        ValueError,
        match=r"vllm_flash_attn: .*; flash_attn: .*; xf.*: .*; triton: no T.*; triton_.*: no T",
    ):
        choose("cuda", None, NEEDS)


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_torch_attends() -> None:
    assert choose("cpu", None, NEEDS)[0] == "torch"
    with pytest.raises(ValueError, match=r"compiled: it cannot be compiled here \(no C\+\+"):
        choose("cpu", "compiled", NEEDS)


def test_the_gpus_code_runs_on_a_cpu_in_the_interpreter_only(
    monkeypatch: pytest.MonkeyPatch, dca_log: list[str]
) -> None:
    device = devices.current_device(NEEDS, "triton")
    assert device.provider == "triton"
    assert device.decode is decode_attention
    [line] = dca_log
    assert "runs the code for GPUs on this CPU" in line
    assert "in Triton's interpreter" in line
    monkeypatch.setattr(knobs.runtime, "interpret", False)
    with pytest.raises(ValueError, match=r"triton: without a GPU.*set TRITON_INTERPRET=1"):
        devices.current_device(NEEDS, "triton")
    with pytest.raises(ValueError, match=r"'flash_attn' is not known.*compiled, torch, or"):
        devices.current_device(NEEDS, "flash_attn")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": torch.float32, "cache_dtype": torch.float32}, "float16 and bfloat16, and"),
        ({"cache_dtype": torch.float8_e4m3fn}, "cannot read a torch.float8_e4m3fn cache"),
        ({"block_size": 128}, "multiple of 256, not 128"),
        ({"head_size": 100}, "up to 256 in steps of 8, not 100"),
        ({"head_size": 320}, "up to 256 in steps of 8, not 320"),
    ],
)
def test_what_the_package_cannot_do(
    changes: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    interface = ModuleType("flash_attn.flash_attn_interface")
    interface.flash_attn_varlen_func = package_signature  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", interface)
    assert choose("cuda", None, NEEDS)[0] == "flash_attn"
    needs = Needs(**{**vars(NEEDS), **changes})
    with pytest.raises(ValueError, match=reason):
        choose("cuda", "flash_attn", needs)


@pytest.mark.parametrize("has_soft_cap", [False, True])
def test_an_old_package_is_not_called(
    has_soft_cap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its log-sum-exps lie otherwise. Another is chosen, and start-up says why."""

    def old(q: Any, k: Any, v: Any) -> None: ...

    needs = dataclasses.replace(NEEDS, has_soft_cap=has_soft_cap)
    interface = ModuleType("flash_attn.flash_attn_interface")
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", interface)
    interface.flash_attn_varlen_func = package_signature  # type: ignore[attr-defined]
    assert choose("cuda", None, needs)[0] == "flash_attn"
    interface.flash_attn_varlen_func = old  # type: ignore[attr-defined]
    name, _, reasons = choose("cuda", None, needs)
    assert name == "triton"
    assert any("2.6 or later works" in reason for reason in reasons)
    if has_soft_cap:
        with pytest.raises(ValueError, match=r"xformers: .*no soft cap.*triton do"):
            choose("cuda", "xformers", needs)


def test_a_card_that_vllm_has_no_flash_attention_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.attention.backends import fa_utils

    bundled = ModuleType("vllm.vllm_flash_attn")
    bundled.flash_attn_varlen_func = package_signature  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm.vllm_flash_attn", bundled)
    monkeypatch.setattr(fa_utils, "get_flash_attn_version", lambda **_: None, raising=False)
    with pytest.raises(ValueError, match=r"vLLM has none for compute capability \(9, 0\)"):
        choose("cuda", "vllm_flash_attn", NEEDS)
    assert choose("cuda", None, NEEDS)[0] == "triton"


def test_triton_reads_e4m3_where_the_card_does() -> None:
    needs = Needs(128, torch.bfloat16, torch.float8_e4m3fn, 16, (8, 0))
    with pytest.raises(ValueError, match=r"capability 8.9.*--kv-cache-dtype fp8_e5m2 works"):
        choose("cuda", None, needs)
    for dtype, capability in ((torch.float8_e4m3fn, (8, 9)), (torch.float8_e5m2, (8, 0))):
        needs = Needs(128, torch.bfloat16, dtype, 16, capability)
        assert choose("cuda", None, needs)[0] == "triton"


def test_layers_of_a_group_want_one_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step's prefills are planned once for all of them."""
    monkeypatch.setattr(devices, "compute_capability", lambda: (9, 0))
    monkeypatch.setattr(devices, "current_platform", SimpleNamespace(is_cpu=lambda: False))
    passes = by_passes(PrefillOperations(turn_queries, paged_pass.attention, merge_parts))
    config: Any = SimpleNamespace(
        model_config=SimpleNamespace(dtype=torch.bfloat16),
        cache_config=SimpleNamespace(user_specified_block_size=True, block_size=16),
    )

    def layer(provider: str, prefill: Any, soft_cap: float | None, cache: str = "auto") -> Any:
        device = SimpleNamespace(provider=provider, prefill=prefill)
        impl = SimpleNamespace(prepared=SimpleNamespace(device=device), soft_cap=soft_cap)
        return SimpleNamespace(head_size=64, kv_cache_dtype=cache, impl=impl)

    plain = layer("xformers", passes, None)
    devices.check_one_plan(
        {"a": plain, "b": layer("triton_passes", passes, 30.0), "c": plain}, config
    )
    with pytest.raises(ValueError, match=r"a by xformers, b by triton\. Ask") as refusal:
        devices.check_one_plan({"a": plain, "b": layer("triton", WALK, 30.0)}, config)
    advice = """--additional-config '{"dca": {"prefill_provider": "triton"}}'."""
    assert advice in str(refusal.value)
    # What is advised is no plan of either sort where no provider serves all.
    monkeypatch.setattr(devices, "compute_capability", lambda: (8, 0))
    given = {"a": plain, "b": layer("triton", WALK, None, "fp8_e4m3")}
    with pytest.raises(ValueError, match="Use another attention backend"):
        devices.check_one_plan(given, config)
