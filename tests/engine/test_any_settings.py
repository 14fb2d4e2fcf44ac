"""Whatever is asked for, in any mixture: served as asked, or refused in words that name it.

Never an error of Python's own, never another attention, never a setting passed over.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from vllm.model_executor.layers.rotary_embedding import _ROPE_DICT

from tests.helpers import checkpoints, sparse
from tests.helpers.answers import assert_close, generate, of_prompt
from tests.helpers.cases import cases
from tests.helpers.inprocess import engine
from tests.helpers.mixtures import (
    ALWAYS_REFUSED,
    FAULTS,
    KINDS,
    MIXTURES,
    OVERRIDES,
    PLAIN,
    SPECULATION,
    WINDOWED,
    Mixture,
    is_windows_only,
    spoiled,
)
from vllm_dca.method.config import OPTION_KEYS
from vllm_dca.method.sparse_config import SPARSE_KEYS
from vllm_dca.reference.model import prompt_logprobs
from vllm_dca.reference.sparse import Rule

# What a refusal may name instead of the key: what people type, and what DCA worked out from it.
WORDS = {
    "dca": ('"dca"',),
    "checkpoint": ("dual_chunk_attention_config",),
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


def can_be_tried(given: dict[str, Any]) -> bool:
    """Not what is refused for its kind, where vLLM itself would stumble over the rest."""
    ranks = given.get("decode_context_parallel_size", 1)
    if given.get("kind") == "no attention" and ranks > 1:
        return False
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
    mixture: Mixture, found: Any, models: dict[str | None, Path]
) -> None:
    """Everything that was given is what the engine will have."""
    from vllm_dca.engine.backend import DcaBackend

    given = mixture.given
    assert not mixture.named, f"served with a fault, in spite of {mixture.named}"
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


def assert_refused_by_name(mixture: Mixture, error: Exception) -> None:
    """The message names its one fault, or of random settings one that was given."""
    given, named = mixture
    assert named != (), f"valid settings are refused: {error}"
    words = list(named or ())
    if named is None:
        words += (word for key in given for word in WORDS[key])
        for options in (given["dca"], given.get("checkpoint")):
            words += options if isinstance(options, dict) else ()
    assert any(word in str(error) for word in words), error


def is_served(mixture: Mixture, models: dict[str | None, Path]) -> bool:
    """As asked, or else it is refused by name."""
    from vllm.engine.arg_utils import EngineArgs

    try:
        with pytest.MonkeyPatch.context() as patch:
            # As with the package of suffix decoding installed, which vLLM asks for first.
            patch.setattr("vllm.config.speculative.has_arctic_inference", lambda: True)
            found = EngineArgs(**arguments(mixture.given, models)).create_engine_config()
    except (ValueError, NotImplementedError) as error:
        assert_refused_by_name(mixture, error)
        return False
    assert_served_as_asked(mixture, found, models)
    return True


@pytest.mark.parametrize(
    ("place", "values", "named"), FAULTS, ids=[place for place, *_ in FAULTS]
)
def test_each_fault_is_named(
    place: str, values: list[Any], named: tuple[str, ...], models: dict[str | None, Path]
) -> None:
    assert is_served(Mixture(PLAIN, ()), models)
    for value in values:
        assert not is_served(spoiled(PLAIN, place, value, named), models)


def test_settled_as_asked_or_refused_by_name(models: dict[str | None, Path]) -> None:
    served: list[bool] = []

    @given(mixture=MIXTURES)
    @settings(max_examples=cases(200), deadline=None, print_blob=True)
    def settled(mixture: Mixture) -> None:
        assume(can_be_tried(mixture.given))
        served.append(is_served(mixture, models))

    settled()
    # Else what is served would hardly be looked at.
    assert sum(served) >= len(served) / 5


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
@given(mixture=MIXTURES)
@settings(max_examples=60, deadline=None, print_blob=True)
def test_what_starts_agrees_with_the_reference(
    mixture: Mixture,
    models: dict[str | None, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    given = mixture.given
    assume(can_be_tried(given))
    # What serves its windows on a CPU takes few shapes; tests/engine/test_models.py has those.
    # The others are refused by their config.
    assume(given.get("kind") in (None, "windows"))
    # With numba in this process vLLM 0.32 starts no other engine; tests/engine/test_models.py
    # speculates in one of its own. Suffix decoding is a package that is not there.
    assume(given.get("speculative_config") != "suffix")
    if given.get("speculative_config") == "ngram":
        del given["speculative_config"]
    options = arguments(given, models)
    model = Path(options.pop("model"))
    served = as_served(model, given, tmp_path_factory.mktemp("served"))
    # Past the threshold there must be segments.
    is_sparse = isinstance(given["dca"], dict) and given["dca"].get("sparse") == "auto"
    prompt = checkpoints.tokens(900 if is_sparse else 300)
    # Room for what `engine` would not give by itself.
    options.setdefault("num_gpu_blocks_override", 8192 // options["block_size"])
    if is_sparse:
        options.setdefault("max_num_batched_tokens", 256)
    # vLLM keeps LongRoPE's module for any length, made for the length of the engine before.
    _ROPE_DICT.clear()
    # The sparse reference knows a model's own frequencies only.
    assume(not (is_sparse and "scaling" in given))
    try:
        with engine(model, **options) as llm:
            found = llm.llm_engine.vllm_config
            assert_served_as_asked(mixture, found, models)
            if found.model_config.max_model_len <= len(prompt):
                return
            [answer] = generate(llm, [prompt], prompt_logprobs=0)
            settled = found.additional_config["dca"]
            step = found.scheduler_config.max_num_batched_tokens
    except (ValueError, NotImplementedError) as error:
        assert_refused_by_name(mixture, error)
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
