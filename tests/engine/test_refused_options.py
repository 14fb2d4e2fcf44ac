"""What sizes, options and devices are refused at start-up, in words that help."""

import re
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import checkpoints
from tests.helpers.answers import assert_close, generate, of_prompt
from tests.helpers.checkpoints import SIZES
from tests.helpers.inprocess import engine, settle
from vllm_dca.reference.model import prompt_logprobs

pytestmark = pytest.mark.each_minor

# What vLLM asks a backend about.
BASE = {
    "head_size": 128,
    "dtype": torch.bfloat16,
    "kv_cache_dtype": "auto",
    "block_size": 16,
    **dict.fromkeys(("use_mla", "has_sink", "use_sparse", "use_mm_prefix"), False),
    "use_per_head_quant_scales": False,
    "device_capability": None,
    "attn_type": "decoder",
}


@pytest.mark.parametrize(
    ("sizes", "block_size", "message"),
    [
        ({"chunk_size": 64, "local_size": 64}, 16, "0 < local_size < chunk_size"),
        ({"chunk_size": -64}, 16, "chunk_size must be a positive number of tokens, not -64"),
        ({"local_size": 0}, 16, "local_size must be a positive number of tokens, not 0"),
        ({"size": 64}, 16, 'unknown under "dca": size. Known: chunk_size'),
        (SIZES, 48, "pass --block-size 2 or 4 or 8 or 16 or 32 or 64, or choose"),
        ({"chunk_size": 96, "local_size": 33}, 16, "such as 48"),
        ({}, 128, "Pass --block-size 64 or smaller"),
    ],
)
def test_unusable_sizes(
    sizes: dict[str, int], block_size: int, message: str, llama: Path
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        settle(llama, additional_config={"dca": sizes}, block_size=block_size)


def test_a_chunk_size_over_the_window_is_warned_of_and_works(
    llama: Path, dca_log: list[str]
) -> None:
    sizes = {"chunk_size": 256, "local_size": 64}
    with engine(llama, additional_config={"dca": sizes}) as llm:
        warned = "chunk_size 256 is over the model's window of 128 tokens"
        assert sum(warned in line for line in dca_log) == 1
        prompt = checkpoints.tokens(600)
        [output] = generate(llm, [prompt], prompt_logprobs=0)
    assert_close(of_prompt(output), prompt_logprobs(llama, prompt, **sizes))


@pytest.mark.parametrize("max_model_len", [64, 128, 1024, None])
def test_any_length_inside_or_past_the_window(max_model_len: int | None, llama: Path) -> None:
    config = settle(llama, max_model_len=max_model_len)
    assert config.model_config.max_model_len == (max_model_len or 128)


def test_the_block_size_is_the_one_that_the_engine_will_have(llama: Path) -> None:
    """vLLM 0.33 has another in its config until the model is loaded."""
    sizes = {"chunk_size": 96, "local_size": 16}
    with pytest.raises(ValueError, match=r"80 is not one of 128: pass --block-size 2 or 4 or"):
        settle(llama, additional_config={"dca": sizes}, block_size=None)
    sizes = {"chunk_size": 144, "local_size": 16}
    options = {"block_size": None, "additional_config": {"dca": sizes}}
    with engine(llama, **options, num_gpu_blocks_override=None) as llm:
        assert llm.llm_engine.vllm_config.cache_config.block_size == 128


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_cache_dtype": "fp8"}, "does not support --kv-cache-dtype fp8"),
        (
            {"additional_config": {"dca": {"prefill_provider": "flash_attn"}}},
            "'flash_attn' is not known on this device; choose from compiled, torch,",
        ),
        (
            {"kv_cache_dtype": "bfloat16"},
            # DCA's words, and those of vLLM 0.33, which comes first there.
            "--kv-cache-dtype bfloat16 with a torch.float32 model"
            '|kv_cache_dtype="bfloat16" is incompatible with dtype="float32"',
        ),
        (
            {
                "attention_backend": None,
                "attention_config": {"backend_per_kind": {"full_attention": "DCA"}},
            },
            "backend_per_kind",
        ),
        (
            {"speculative_config": {"method": "ngram_gpu", "num_speculative_tokens": 2}},
            "speculative decoding by ngram_gpu",
        ),
        ({"decode_context_parallel_size": 2, "tensor_parallel_size": 2}, "--decode-context"),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], message: str, llama: Path) -> None:
    with (
        pytest.raises((NotImplementedError, ValueError), match=message),
        engine(llama, **options),
    ):
        pass


@pytest.mark.parametrize(
    ("config", "architecture"),
    [("Gemma2Config", "Gemma2ForCausalLM"), ("GptOssConfig", "GptOssForCausalLM")],
    ids=["soft cap", "sinks"],
)
def test_where_soft_caps_and_sinks_are_refused(
    config: str, architecture: str, tmp_path: Path
) -> None:
    changes = {"layer_types": ["full_attention"] * 2, "sliding_window": None}
    model = checkpoints.write_config(tmp_path, config, architecture, **changes)
    dca = {"chunk_size": 384, "local_size": 128, "sparse": "auto"}
    with (
        pytest.raises(NotImplementedError, match="sparse prefill knows no soft cap and no"),
        engine(model, additional_config={"dca": dca}, max_num_batched_tokens=256),
    ):
        pass


def test_what_only_gpus_have_is_refused(llama: Path) -> None:
    """On the CPU vLLM switches it off, or refuses it, by itself."""
    from vllm_dca.engine.refusals import refusals

    config = settle(llama)
    assert refusals(config) == []
    config.parallel_config.enable_dbo = True
    config.parallel_config.prefill_context_parallel_size = 2
    [context, overlap] = refusals(config)
    assert context.startswith("--prefill-context-parallel-size")
    assert overlap == "--enable-dbo"


def test_other_platforms_are_refused(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_dca.engine import refusals

    no = {"is_cpu": lambda: False, "is_cuda": lambda: False}
    platform = types.SimpleNamespace(device_name="tpu", **no)
    monkeypatch.setattr(refusals, "current_platform", platform)
    with pytest.raises(NotImplementedError, match="the tpu platform"):
        settle(llama)


@pytest.mark.parametrize(
    ("is_cpu", "named", "expected"), [(True, False, 128), (True, True, 16), (False, False, 16)]
)
def test_the_block_size_that_a_config_does_not_tell_is_the_cpu_s(
    is_cpu: bool, named: bool, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_dca.engine import block_size

    platform = types.SimpleNamespace(is_cpu=lambda: is_cpu)
    monkeypatch.setattr(block_size, "current_platform", platform)
    cache: Any = types.SimpleNamespace(user_specified_block_size=named, block_size=16)
    config: Any = types.SimpleNamespace(cache_config=cache)
    assert block_size.block_size_of(config) == expected


@pytest.mark.parametrize(
    ("use", "reason"),
    [
        ("use_batch_invariant", "batch invariance not supported"),
        ("use_dcp", "DCP not supported"),
        ("use_pcp", "PCP not supported"),
        (
            "use_mm_prefix",
            "partial multimodal token full attention not supported",
        ),
    ],
)
def test_what_vllm_is_told_that_dca_cannot(use: str, reason: str) -> None:
    from vllm_dca.engine.backend import DcaBackend

    assert DcaBackend.validate_configuration(**BASE) == []
    assert DcaBackend.validate_configuration(**{**BASE, use: True}) == [reason]


def test_unknown_cache_dtype_is_left_to_vllm() -> None:
    from vllm_dca.engine.backend import DcaBackend

    reasons = DcaBackend.validate_configuration(**{**BASE, "kv_cache_dtype": "nvfp4"})
    assert reasons == ["kv_cache_dtype not supported"]


@pytest.mark.parametrize(
    ("capability", "dtype", "head_size", "reason"),
    [
        ((7, 5), torch.float16, 128, "7.5: below 8.0 Triton.*without tensor cores; a card of"),
        ((8, 9), torch.float32, 512, None),
        ((9, 0), torch.bfloat16, 320, None),
    ],
)
def test_cards_that_are_refused(
    capability: tuple[int, int], dtype: torch.dtype, head_size: int, reason: str | None
) -> None:
    from vllm.platforms.interface import DeviceCapability

    from vllm_dca.engine.backend import DcaBackend

    found = DcaBackend.supports_combination(
        head_size, dtype, "auto", 16, False, False, False, False, DeviceCapability(*capability)
    )
    if reason is None:
        assert found is None
    else:
        assert re.search(reason, found)


def test_a_shared_store_of_keys_is_warned_of(llama: Path, dca_log: list[str]) -> None:
    """A store's names do not tell the chunk sizes, so people must."""
    from vllm.config import KVTransferConfig

    options = {"additional_config": {"dca": SIZES}}
    settle(llama, **options)
    assert not any("rotated" in line for line in dca_log)
    settle(
        llama,
        **options,
        kv_transfer_config=KVTransferConfig("ExampleConnector", kv_role="kv_both"),
    )
    settle(llama, **options, kv_offloading_size=1.0)
    [shared, offloaded] = [line for line in dca_log if "as DCA rotated them" in line]
    assert shared.startswith("DCA: ExampleConnector stores keys")
    assert offloaded.startswith("DCA: OffloadingConnector stores keys")
    sizes = "chunk_size 96, local_size 32 and original_max_position_embeddings null. Give"
    assert sizes in shared
    assert sizes in offloaded
    temperature = {**SIZES, "original_max_position_embeddings": 64}
    settle(llama, additional_config={"dca": temperature}, kv_offloading_size=1.0)
    assert "original_max_position_embeddings 64. Give" in dca_log[-1]
    assert sum("temperature from 64 tokens; up to" in line for line in dca_log) == 1
