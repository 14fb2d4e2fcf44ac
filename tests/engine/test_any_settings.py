"""Whatever is asked for, in any mixture: served as asked, or refused in words that name it.

Never an error of Python's own, never another attention, never a setting passed over.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from vllm.model_executor.layers.rotary_embedding import _ROPE_DICT

from tests.helpers import checkpoints, sparse
from tests.helpers.answers import assert_close, generate, of_prompt
from tests.helpers.cases import cases
from tests.helpers.inprocess import engine
from vllm_dca.method.config import OPTION_KEYS
from vllm_dca.method.sparse_config import SPARSE_KEYS
from vllm_dca.reference.model import prompt_logprobs
from vllm_dca.reference.sparse import Rule

SIZES = st.sampled_from([8, 16, 32, 48, 64, 96, 100, 128, 256])
NONSENSE = st.sampled_from([0, -16, 1.5, "64", "", True, None, [], {}, 10**30])
VALUES = SIZES | NONSENSE
OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "chunk_size": VALUES,
        "local_size": VALUES,
        "original_max_position_embeddings": VALUES,
        "prefill_provider": st.sampled_from([None, "torch", "flash_attn", "nonsense", 7]),
        "sparse": st.sampled_from(["off", "auto", "checkpoint", "nonsense", False, [], {}]),
        "sparse_threshold": VALUES,
        "sparse_coverage": st.sampled_from([0.5, 0.95, 1, 0, 2.0, "0.9"]),
        "sparse_min_keys": VALUES,
        "sparse_min_recall": st.sampled_from([0.5, 1, 0, -1, True, "0.9"]),
        "sparse_budgets": st.sampled_from(["/no/such/file", "/dev/null", 7, None]),
        "chunk_len": SIZES,
    },
)
CHECKPOINT = st.fixed_dictionaries(
    {},
    optional={
        "chunk_size": VALUES,
        "local_size": VALUES,
        "original_max_position_embeddings": VALUES,
        "sparse_attention_enabled": st.just(False),
        "sparse_attention_threshold": VALUES,
    },
) | st.sampled_from([[64], "nonsense", 7])
# Models that the support table refuses by their config: class, architecture, what is changed,
# and a word of the message.
KINDS: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "MLA": ("DeepseekV2Config", "DeepseekV2ForCausalLM", {}, "MLA"),
    "encoder": ("BertConfig", "BertModel", {}, "encoder-only"),
    "encoder-decoder": (
        *("WhisperConfig", "WhisperForConditionalGeneration", {}),
        "encoder-decoder",
    ),
    "no attention": ("MambaConfig", "MambaForCausalLM", {}, "without attention"),
    "ALiBi": ("BloomConfig", "BloomForCausalLM", {"n_head": 4}, "ALiBi"),
}
SPECULATION: dict[str, dict[str, Any]] = {
    "ngram": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3},
    "none by ngram": {"method": "ngram", "num_speculative_tokens": 0},
    "ngram_gpu": {"method": "ngram_gpu", "num_speculative_tokens": 2},
    "suffix": {"method": "suffix", "num_speculative_tokens": 2},
    "nonsense": {"method": "nonsense", "num_speculative_tokens": 2},
}
# Models that are served, with a window or two.
WINDOWED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "windows": ("MistralConfig", "MistralForCausalLM", {"sliding_window": 32}),
    "some windows": (
        "Gemma2Config",
        "Gemma2ForCausalLM",
        {
            "sliding_window": 32,
            "layer_types": ["sliding_attention", "full_attention"],
            "tie_word_embeddings": True,
        },
    ),
}
_YARN = {
    "rope_type": "yarn",
    "factor": 2.0,
    "original_max_position_embeddings": checkpoints.WINDOW,
    "rope_theta": 1e4,
}
OVERRIDES: dict[str, dict[str, Any]] = {
    "longer": {"max_position_embeddings": 256},
    "YaRN": {"max_position_embeddings": 256, "rope_parameters": _YARN},
    "YaRN alone": {"rope_parameters": _YARN},
    "a window": {"sliding_window": 48},
    "a window of nothing": {"sliding_window": 0},
    "no window": {"sliding_window": None},
}
GIVEN = st.fixed_dictionaries(
    {"dca": OPTIONS | st.sampled_from([None, [], "chunk_size", 64])},
    optional={
        "checkpoint": CHECKPOINT,
        "block_size": st.sampled_from([8, 16, 17, 32, 64, 128]),
        "max_model_len": st.sampled_from([1, 64, 128, 129, 500, 4096, 0]),
        "kv_cache_dtype": st.sampled_from(["auto", "fp8", "bfloat16", "nonsense"]),
        "dtype": st.sampled_from(["float32", "bfloat16", "float64"]),
        "scaling": st.sampled_from(list(checkpoints.SCALINGS)),
        "kind": st.sampled_from([*KINDS, *WINDOWED]),
        "overrides": st.sampled_from(list(OVERRIDES)),
        "disable_sliding_window": st.booleans(),
        "speculative_config": st.sampled_from(list(SPECULATION)),
        "max_num_batched_tokens": st.sampled_from([1, 64, 256, 8192, 0, -1]),
        "decode_context_parallel_size": st.sampled_from([1, 2]),
        "prefill_context_parallel_size": st.sampled_from([1, 2]),
    },
)
# Most of which is served.
WINDOWS = st.fixed_dictionaries(
    {"dca": st.just({})},
    optional={
        "scaling": st.sampled_from(list(checkpoints.SCALINGS)),
        "kind": st.sampled_from(list(WINDOWED)),
        "overrides": st.sampled_from(list(OVERRIDES)),
        "disable_sliding_window": st.booleans(),
        "max_model_len": st.sampled_from([1, 32, 64, 500]),
    },
)
# Most of which is served, too.
SPARSELY = st.fixed_dictionaries(
    {
        "dca": st.fixed_dictionaries(
            {
                "sparse": st.just("auto"),
                "chunk_size": st.sampled_from([384, 448, 512]),
                "local_size": st.sampled_from([64, 96, 128]),
                "sparse_threshold": st.sampled_from([0, 10, 150, 300]),
            },
            optional={
                "sparse_coverage": st.sampled_from([0.3, 0.95, 1, 0]),
                "sparse_min_keys": st.sampled_from([0, 64, 5000, -1]),
                "sparse_min_recall": st.sampled_from([0.5, 1, True]),
                "sparse_budgets": st.just("/dev/null"),
                "original_max_position_embeddings": st.sampled_from([64, None]),
                "prefill_provider": st.sampled_from(["torch", "compiled"]),
            },
        ),
        "max_model_len": st.just(1000),
    },
    optional={
        "block_size": st.sampled_from([16, 32, 64, 128]),
        "max_num_batched_tokens": st.sampled_from([255, 256, 512, 8192]),
        "scaling": st.sampled_from(list(checkpoints.SCALINGS)),
        "dtype": st.sampled_from(["float32", "bfloat16"]),
        "speculative_config": st.just("ngram"),
    },
)
# What a refusal may name instead of the key: what people type, and what DCA worked out from it.
WORDS = {
    "dca": ('"dca"',),
    "checkpoint": ("dual_chunk_attention_config", *OPTION_KEYS, "sparse_attention_threshold"),
    "block_size": ("block size", "--block-size", "block_size"),
    "max_model_len": ("max_model_len", "max-model-len"),
    "kv_cache_dtype": ("--kv-cache-dtype", "cache_dtype"),
    "dtype": ("dtype",),
    "scaling": ("scaling",),
    "kind": (*(word for *_, word in KINDS.values()), "sliding-window"),
    "overrides": ("sliding-window",),
    "disable_sliding_window": (),
    "speculative_config": ("specul", "ngram"),
    "max_num_batched_tokens": ("max_num_batched_tokens", "max-num-batched-tokens"),
    "decode_context_parallel_size": ("decode", "dcp"),
    "prefill_context_parallel_size": ("prefill", "pcp"),
}
# What nothing can make it serve.
ALWAYS_REFUSED: dict[str, tuple[Any, ...]] = {
    "kind": tuple(KINDS),
    "kv_cache_dtype": ("fp8", "nonsense"),
    "dtype": ("float64",),
    "speculative_config": ("none by ngram", "ngram_gpu", "suffix", "nonsense"),
    "max_model_len": (0,),
    "max_num_batched_tokens": (0, -1),
    "decode_context_parallel_size": (2,),
    "prefill_context_parallel_size": (2,),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str | None, Path]:
    folder = tmp_path_factory.mktemp("models")
    made = {None: checkpoints.write(folder / "plain", "LlamaConfig")}
    for name, parameters in checkpoints.SCALINGS.items():
        made[name] = checkpoints.write(
            folder / name.replace(" ", "-"), "LlamaConfig", rope_parameters=parameters
        )
    for name, (config, _, changes) in WINDOWED.items():
        made[name] = checkpoints.write(folder / name.replace(" ", "-"), config, **changes)
    for name, (config, architecture, changes, _) in KINDS.items():
        made[name] = checkpoints.write_config(
            folder / name.replace(" ", "-"), config, architecture, **changes
        )
    return made


def arguments(given: dict[str, Any], models: dict[str | None, Path]) -> dict[str, Any]:
    """The engine's arguments for what was given."""
    apart = ("dca", "checkpoint", "scaling", "kind", "overrides", "speculative_config")
    rest = {key: given[key] for key in given if key not in apart}
    if "speculative_config" in given:
        rest["speculative_config"] = dict(SPECULATION[given["speculative_config"]])
    rest["hf_overrides"] = dict(OVERRIDES.get(given.get("overrides"), {}))
    if "checkpoint" in given:
        rest["hf_overrides"]["dual_chunk_attention_config"] = given["checkpoint"]
    return {
        "model": str(models[given.get("kind", given.get("scaling"))]),
        "attention_backend": "dca",
        "additional_config": {"dca": given["dca"]},
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "block_size": 16,
        **rest,
    }


def is_windows_only(given: dict[str, Any]) -> bool:
    """Whether every layer has a window, which DCA refuses."""
    overridden = OVERRIDES.get(given.get("overrides"), {})
    has_windows = overridden.get("sliding_window", given.get("kind") == "windows")
    kept = has_windows and not given.get("disable_sliding_window")
    return bool(kept) and given.get("kind") != "some windows"


def can_be_overridden(given: dict[str, Any]) -> bool:
    """Not what is refused for its kind."""
    return "overrides" not in given or given.get("kind") not in KINDS


def trained_window(given: dict[str, Any], asked: int, models: dict[str | None, Path]) -> int:
    """The length that vLLM takes by itself, but for what docs/configuration.md excepts."""
    from vllm.engine.arg_utils import EngineArgs

    options = arguments(given, models)
    for of_dca in ("attention_backend", "additional_config", "max_model_len"):
        options.pop(of_dca, None)
    alone = EngineArgs(**options).create_model_config()
    config, window = alone.hf_text_config, int(alone.max_model_len)
    overridden = OVERRIDES.get(given.get("overrides"), {})
    scaling = (
        None if {"kind", "rope_parameters"} & {*given, *overridden} else given.get("scaling")
    )
    if scaling == "LongRoPE":
        short = checkpoints.SCALINGS[scaling]["original_max_position_embeddings"]
        window = short if asked <= short else config.max_position_embeddings
    if scaling in ("LongRoPE", "dynamic NTK"):
        window = min(window, config.max_position_embeddings)
        if given.get("disable_sliding_window"):
            window = min(window, overridden.get("sliding_window") or window)
    checkpoint = given.get("checkpoint", {})
    if "chunk_size" in checkpoint:
        reached = checkpoint.get("original_max_position_embeddings") or 0
        window = min(window, max(checkpoint["chunk_size"], reached))
    return window


def assert_served_as_asked(
    given: dict[str, Any], found: Any, models: dict[str | None, Path]
) -> None:
    """Everything that was given is what the engine will have."""
    from vllm_dca.engine.backend import DcaBackend

    for key, values in ALWAYS_REFUSED.items():
        assert given.get(key) not in values
    assert not is_windows_only(given)
    attention = found.attention_config
    # Layers with a window keep one of vLLM's choice.
    backend = attention.backend or attention.backend_per_kind["full_attention"]
    assert backend.get_class() is DcaBackend
    settled = found.additional_config["dca"]
    assert set(given["dca"]) <= set(OPTION_KEYS)
    window = trained_window(given, found.model_config.max_model_len, models)
    assert settled["window"] == window
    asked = dict(given["dca"])
    of_sparse = {key: asked.pop(key) for key in SPARSE_KEYS if key in asked}
    assert (settled["sparse"] is not None) == (of_sparse.pop("sparse", "off") != "off")
    for key, value in of_sparse.items():
        assert settled["sparse"][key.removeprefix("sparse_")] == value
    for key, value in asked.items():
        assert settled[key] == value
    sizes_named = {"chunk_size", "local_size"} & set(given["dca"])
    for key in ("chunk_size", "local_size"):
        if not sizes_named and key in given.get("checkpoint", {}):
            assert settled[key] == given["checkpoint"][key]
    assert 0 < settled["local_size"] < settled["chunk_size"]
    assert (settled["chunk_size"] - settled["local_size"]) % given.get("block_size", 16) == 0
    if "max_model_len" in given:
        assert found.model_config.max_model_len == given["max_model_len"]
    if "speculative_config" in given:
        asked_for = SPECULATION[given["speculative_config"]]["method"]
        assert found.speculative_config.method == asked_for


def assert_refused_by_name(given: dict[str, Any], error: Exception) -> None:
    """The message names something that was given."""
    words = [word for key in given for word in WORDS[key]]
    if isinstance(given["dca"], dict):
        words += given["dca"]
    assert any(word in str(error) for word in words), error


@given(given=GIVEN | WINDOWS | SPARSELY)
@settings(
    max_examples=cases(250),
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_settled_as_asked_or_refused_by_name(
    given: dict[str, Any], models: dict[str | None, Path]
) -> None:
    from vllm.engine.arg_utils import EngineArgs

    assume(can_be_overridden(given))
    # vLLM itself divides by the heads of a model that has none.
    ranks = given.get("decode_context_parallel_size", 1)
    assume(given.get("kind") != "no attention" or ranks == 1)
    try:
        with pytest.MonkeyPatch.context() as patch:
            # As with the package of suffix decoding installed, which vLLM asks for first.
            patch.setattr("vllm.config.speculative.has_arctic_inference", lambda: True)
            found = EngineArgs(**arguments(given, models)).create_engine_config()
    except (ValueError, NotImplementedError) as error:
        assert_refused_by_name(given, error)
    else:
        assert_served_as_asked(given, found, models)


def as_served(model: Path, given: dict[str, Any], directory: Path) -> Path:
    """The checkpoint that says itself what the overrides and options make of it."""
    config = json.loads((model / "config.json").read_text())
    config |= OVERRIDES.get(given.get("overrides"), {})
    if given.get("disable_sliding_window") or not config.get("sliding_window"):
        config["sliding_window"] = None
    (directory / "config.json").write_text(json.dumps(config))
    for weights in model.glob("*.safetensors"):
        (directory / weights.name).symlink_to(weights)
    return directory


@pytest.mark.nightly
@given(given=GIVEN | WINDOWS | SPARSELY)
@settings(max_examples=60, deadline=None, print_blob=True)
def test_what_starts_agrees_with_the_reference(
    given: dict[str, Any],
    models: dict[str | None, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    assume(can_be_overridden(given))
    # What serves its windows on a CPU takes few shapes; tests/engine/test_models.py has those.
    assume(given.get("kind") != "some windows")
    # With numba in this process vLLM 0.32 starts no other engine; tests/engine/test_models.py
    # speculates in one of its own.
    if given.get("speculative_config") in ("ngram", "suffix"):
        del given["speculative_config"]
    options = arguments(given, models)
    model = Path(options.pop("model"))
    served = as_served(model, given, tmp_path_factory.mktemp("served"))
    # Past the threshold there must be segments.
    is_sparse = isinstance(given["dca"], dict) and given["dca"].get("sparse") == "auto"
    prompt = checkpoints.tokens(900 if is_sparse else 300)
    # vLLM keeps LongRoPE's module for any length, made for the length of the engine before.
    _ROPE_DICT.clear()
    # The sparse reference knows a model's own frequencies only.
    assume(not (is_sparse and "scaling" in given))
    try:
        with engine(model, **options) as llm:
            found = llm.llm_engine.vllm_config
            assert_served_as_asked(given, found, models)
            if found.model_config.max_model_len <= len(prompt):
                return
            [answer] = generate(llm, [prompt], prompt_logprobs=0)
            settled = found.additional_config["dca"]
            step = found.scheduler_config.max_num_batched_tokens
    except (ValueError, NotImplementedError) as error:
        assert_refused_by_name(given, error)
        return
    if given.get("dtype") == "bfloat16":
        return
    names = ("chunk_size", "local_size", "original_max_position_embeddings")
    sizes = {name: settled[name] for name in names}
    if settled["sparse"]:
        rule = Rule(
            coverage=settled["sparse"]["coverage"], min_keys=settled["sparse"]["min_keys"]
        )
        steps = [step] * (len(prompt) // step) + [len(prompt) % step]
        expected = sparse.prompt_logprobs(
            served,
            prompt,
            steps=[each for each in steps if each],
            threshold=settled["sparse"]["threshold"],
            rules=[rule] * 2,
            **sizes,
        )
    else:
        expected = prompt_logprobs(served, prompt, **sizes)
    assert_close(of_prompt(answer), expected)
