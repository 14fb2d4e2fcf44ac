"""Settings in any mixture: valid ones, such with one fault, and wholly random ones."""

import copy
import math
from typing import Any, NamedTuple

from hypothesis import strategies as st

from tests.helpers import checkpoints

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


class Mixture(NamedTuple):
    """What somebody might ask for.

    Attributes:
        given: to `arguments` of test_any_settings.py.
        named: words of which a refusal must have one; none where it must be served, and None
            where it may be either.
    """

    given: dict[str, Any]
    named: tuple[str, ...] | None


def is_windows_only(given: dict[str, Any]) -> bool:
    """Whether every layer has a window, which DCA refuses."""
    overridden = OVERRIDES.get(given.get("overrides"), {})
    has_windows = overridden.get("sliding_window", given.get("kind") == "windows")
    kept = has_windows and not given.get("disable_sliding_window")
    return bool(kept) and given.get("kind") != "some windows"


@st.composite
def valid(draw: st.DrawFn) -> dict[str, Any]:
    """Anything that is to be served."""
    given = draw(VALID.filter(lambda given: not is_windows_only(given)))
    sparse = draw(SPARSE | st.just({}))
    # Whatever is derived has room for such blocks.
    derived = not sparse and draw(st.booleans())
    block = draw(st.sampled_from([8, 16] if derived else [8, 16, 32, 64, 128]))
    # Left out it is 16.
    if block != 16 or draw(st.booleans()):
        given["block_size"] = block
    dca = dict(sparse)
    if derived:
        if draw(st.booleans()):
            dca["chunk_size"] = draw(st.integers(2 * block, 300))
    else:
        unit, least = (math.lcm(block, 64), 256) if sparse else (block, 1)
        chunk_len = unit * draw(st.integers(-(-least // unit), -(-600 // unit)))
        local_size = draw(st.integers(1, 200))
        sizes = {"chunk_size": chunk_len + local_size, "local_size": local_size}
        if draw(st.booleans()):
            dca |= sizes
        else:
            given["checkpoint"] = {**sizes, **draw(OF_CHECKPOINT)}
    given["dca"] = dca | draw(OF_DENSE)
    # For a request of one token vLLM's own steps are small, too.
    steps = given.get("max_num_batched_tokens", 128 * given.get("max_model_len", 128))
    if sparse and steps < 256:
        given["max_num_batched_tokens"] = 256
    if given.get("dtype") == "bfloat16" and draw(st.booleans()):
        given["kv_cache_dtype"] = "bfloat16"
    return given


TOKENS = st.integers(1, 5000)
OF_DENSE = st.fixed_dictionaries(
    {},
    optional={
        "original_max_position_embeddings": st.none() | TOKENS,
        "prefill_provider": st.sampled_from([None, "torch", "compiled"]),
    },
)
OF_CHECKPOINT = st.fixed_dictionaries(
    {},
    optional={
        "original_max_position_embeddings": st.just(0) | TOKENS,
        "sparse_attention_enabled": st.booleans(),
        "sparse_attention_threshold": TOKENS,
    },
)
SPARSE = st.fixed_dictionaries(
    {"sparse": st.just("auto")},
    optional={
        "sparse_threshold": st.sampled_from([0, 10, 150, 300, 32768]),
        "sparse_coverage": st.sampled_from([0.3, 0.95, 1]),
        "sparse_min_keys": st.sampled_from([0, 64, 5000]),
        "sparse_min_recall": st.sampled_from([0.5, 1]),
    },
)
VALID = st.fixed_dictionaries(
    {},
    optional={
        "max_model_len": st.sampled_from([1, 64, 128, 129, 500, 4096]),
        "dtype": st.sampled_from(["float32", "bfloat16"]),
        "scaling": st.sampled_from(list(checkpoints.SCALINGS)),
        "kind": st.sampled_from(list(WINDOWED)),
        "overrides": st.sampled_from(list(OVERRIDES)),
        "disable_sliding_window": st.booleans(),
        "speculative_config": st.just("ngram"),
        "max_num_batched_tokens": st.sampled_from([255, 256, 512, 8192]),
    },
)
# What is put into valid settings, and words of which the refusal must have one.
NO_TOKENS = [0, -16, 1.5, "64", "", True, [], {}, 10**30]
NO_SHARE = [0, -1, 2.0, "0.9", True, None]
FAULTS: list[tuple[str, list[Any], tuple[str, ...]]] = [
    ("dca", [None, [], "chunk_size", 64], ('"dca" must be an object',)),
    ("dca.chunk_len", [64], ('unknown under "dca": chunk_len',)),
    ("dca.chunk_size", [*NO_TOKENS, None], ("DCA's chunk_size must be",)),
    ("dca.local_size", [*NO_TOKENS, None], ("DCA's local_size must be",)),
    ("dca.local_size", [1024], ("local_size",)),
    (
        "dca.original_max_position_embeddings",
        NO_TOKENS,
        ("DCA's original_max_position_embeddings must be",),
    ),
    ("dca.prefill_provider", [7, False, []], ("DCA's prefill_provider must be",)),
    ("dca.sparse", ["nonsense", False, [], {}], ("DCA's sparse must be one of",)),
    ("dca.sparse_threshold", [*NO_TOKENS[1:], None], ("DCA's sparse_threshold",)),
    ("dca.sparse_min_keys", [*NO_TOKENS[1:], None], ("DCA's sparse_min_keys",)),
    ("dca.sparse_coverage", NO_SHARE, ("DCA's sparse_coverage",)),
    ("dca.sparse_min_recall", NO_SHARE, ("DCA's sparse_min_recall",)),
    ("dca.sparse_budgets", ["/dev/null", 7, None], ("DCA's sparse_budgets is for",)),
    ("checkpoint", [[64], "nonsense", 7], ("dual_chunk_attention_config must be an object",)),
    ("checkpoint.chunk_size", [*NO_TOKENS, None], ("DCA's chunk_size must be",)),
    ("checkpoint.local_size", [*NO_TOKENS, None], ("DCA's local_size must be",)),
    (
        "checkpoint.original_max_position_embeddings",
        NO_TOKENS[1:],
        ("DCA's original_max_position_embeddings must be",),
    ),
    ("max_model_len", [0], ("max_model_len",)),
    ("max_num_batched_tokens", [0, -1], ("max_num_batched_tokens",)),
    ("kv_cache_dtype", ["fp8", "nonsense"], ("--kv-cache-dtype fp8", "cache_dtype")),
    ("dtype", ["float64"], ("dtype",)),
    ("decode_context_parallel_size", [2], ("dcp_size", "--decode-context-parallel-size")),
    ("prefill_context_parallel_size", [2], ("prefill context parallel", "--prefill-context")),
    ("speculative_config", ["none by ngram"], ("num_speculative_tokens",)),
    ("speculative_config", ["ngram_gpu", "suffix"], ("speculative decoding by",)),
    ("speculative_config", ["nonsense"], ("SpeculativeConfig\nmethod",)),
    ("kind", ["windows"], ("sliding-window layers only",)),
    *(("kind", [kind], (word,)) for kind, (*_, word) in KINDS.items()),
]


PLAIN = {"dca": {"chunk_size": 320, "local_size": 64, "sparse": "auto"}}


def spoiled(given: dict[str, Any], place: str, value: Any, named: tuple[str, ...]) -> Mixture:
    """With a fault put in."""
    given = copy.deepcopy(given)
    where, _, key = place.rpartition(".")
    goal = given.setdefault(where, {}) if where else given
    goal[key] = value
    if key == "kind":
        # With these vLLM itself refuses some, and windows alone may be switched off.
        for other in ("overrides", "max_num_batched_tokens", "disable_sliding_window"):
            given.pop(other, None)
    return Mixture(given, named)


@st.composite
def faulty(draw: st.DrawFn) -> Mixture:
    """Valid but for one thing."""
    given = draw(valid())
    sizes = given["dca"] if "local_size" in given["dca"] else given.get("checkpoint", {})
    if "local_size" in sizes and draw(st.integers(0, 5)) == 0:
        sizes["local_size"] += 1
        return Mixture(given, ("multiple of the KV-cache block size",))
    place, values, named = draw(st.sampled_from(FAULTS))
    return spoiled(given, place, draw(st.sampled_from(values)), named)


MIXTURES = (
    valid().map(lambda given: Mixture(given, ()))
    | faulty()
    | GIVEN.map(lambda given: Mixture(given, None))
)
