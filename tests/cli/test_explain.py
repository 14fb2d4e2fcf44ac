"""`python -m vllm_dca`: what it prints against independent arithmetic and real engines."""

import functools
import json
import logging
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import DEMO_MODEL
from tests.helpers import checkpoints
from tests.helpers.command_line import BLOCK, explained, run, served
from tests.helpers.inprocess import engine, in_a_child
from vllm_dca.method.sparse_cost import SELECTING

pytestmark = pytest.mark.each_minor

# No processor is slow in it, so none is warned of.
FP32 = ("--dtype", "float32")
UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def kv_bytes(said: dict[str, list[str]]) -> list[float]:
    """Of a token, and of a request."""
    sizes = re.findall(r"([\d.e+]+) (bytes|KiB|MiB|GiB)", said["KV cache"][0])
    return [float(number) * UNITS[unit] for number, unit in sizes]


def test_sizes_of_a_derived_geometry(llama: str) -> None:
    said = explained(llama, "--max-model-len", "1K", *FP32, *BLOCK)
    # 3/4 of 128; a sixth of that is local; 80 is in whole blocks of 16.
    assert said["chunk_size"] == ["96 tokens, derived from the trained window of 128 tokens"]
    assert said["local_size"] == ["16 tokens"]
    assert said["chunk_len"] == ["80 tokens, in blocks of 16"]
    assert said["temperature"] == ["none"]
    assert said["trained window"] == ["128 tokens"]
    assert said["max_model_len"] == ["1024 tokens, 8.0 times the window"]
    assert said["DCA attends"] == ["2 of 2 layers: 0-1"]
    assert "warning" not in said


def test_docs_show_what_is_said() -> None:
    page = (Path(__file__).parents[2] / "docs/configuration.md").read_text()
    command, _, shown = page.partition("$ vllm-dca ")[2].partition("\n")
    arguments = command.replace(".cache/demo-model", str(DEMO_MODEL)).split()
    said = run(*arguments).stdout.replace(str(DEMO_MODEL), ".cache/demo-model")
    on_any_processor = functools.partial(re.sub, r"compiled, \w+", "compiled")
    assert on_any_processor(shown).startswith(on_any_processor(f"{said}```"))


@pytest.mark.parametrize(
    ("options", "kv_heads", "itemsize"),
    [
        ((), 2, 2),  # bfloat16 is what vLLM makes of a checkpoint in fp32
        (("--dtype", "float32"), 2, 4),
        (("--tensor-parallel-size", "2"), 1, 2),
        (("--tensor-parallel-size", "4"), 1, 2),  # every rank has a KV head
        (("--hf-overrides", '{"num_key_value_heads": 4}'), 4, 2),
    ],
)
def test_memory_of_the_kv_cache(
    options: tuple[str, ...], kv_heads: int, itemsize: int, llama: str
) -> None:
    layers, head_size, length = 2, 16, 1024
    token = layers * 2 * kv_heads * head_size * itemsize
    said = explained(llama, "--max-model-len", str(length), *BLOCK, *options)
    assert kv_bytes(said) == [token, token * length]
    ranks = options[1] if "--tensor-parallel-size" in options else None
    assert said["KV cache"][0].endswith(f"on each of {ranks} ranks") == (ranks is not None)


def test_memory_where_others_share_it(llama: str) -> None:
    """Engines beside it share none, nor do the nodes of one engine; stages share its layers."""
    one = explained(llama, "--max-model-len", "1024", *BLOCK)["KV cache"][0]
    more = ("--pipeline-parallel-size", "2", "--data-parallel-size", "2", "--nnodes", "2")
    said = explained(llama, "--max-model-len", "1024", *BLOCK, *more)["KV cache"][0]
    assert said == f"{one}, over the 2 stages of the pipeline"


def test_an_engine_allocates_what_was_told(tmp_path: Path) -> None:
    model = checkpoints.write(tmp_path, "LlamaConfig")
    options = ("--max-model-len", "1024", "--dtype", "float32")
    said = explained(str(model), *options, *BLOCK)
    with engine(model) as llm:  # the same options
        [tensors] = llm.apply_model(
            lambda model: [layer.self_attn.attn.kv_cache for layer in model.model.layers]
        )
        settings = llm.llm_engine.vllm_config.additional_config["dca"]
    assert kv_bytes(said)[0] * 200 * 16 == sum(tensor.nbytes for tensor in tensors)
    assert said["chunk_size"][0] == f"{settings['chunk_size']} tokens, {settings['source']}"
    assert said["local_size"][0] == f"{settings['local_size']} tokens"


def test_layers_with_a_window_keep_their_attention(tmp_path: Path) -> None:
    kinds = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
    model = checkpoints.write_config(
        tmp_path,
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        head_dim=32,
        sliding_window=40,
        num_hidden_layers=5,
        layer_types=[*kinds, "full_attention"],
    )
    said = explained(str(model), "--max-model-len", "100K", *BLOCK)
    kept = "0, 3 keep their sliding window of 40 tokens"
    assert said["DCA attends"] == [f"3 of 5 layers: 1-2, 4; {kept}"]
    # Of layers with a window, a longer request has no more.
    token, request = kv_bytes(said)
    assert token == 3 * 2 * 2 * 32 * 2
    assert token < request / (100 * 1024) < 5 / 3 * token


def test_models_by_transformers_code(tmp_path: Path) -> None:
    # vLLM changes the classes that it takes from transformers, for other tests too.
    in_a_child(_explain_transformers_code, tmp_path)


def _explain_transformers_code(tmp_path: Path) -> None:
    model = checkpoints.write_config(
        tmp_path, "SmolLM3Config", "SmolLM3ForCausalLM", no_rope_layers=[1, 0]
    )
    said = explained(str(model), "--max-model-len", "1024", *BLOCK)
    bare = "1 without rotary positions, where DCA changes nothing"
    assert said["DCA attends"] == [f"2 of 2 layers: 0-1; {bare}"]
    assert kv_bytes(said)[0] == 2 * 2 * 2 * 16 * 2


def test_sparse_prefill_is_said(llama: str) -> None:
    dca = {"chunk_size": 384, "local_size": 128, "sparse": "auto", "sparse_threshold": 300}
    options = ("--max-model-len", "1024", "--additional-config", json.dumps({"dca": dca}))
    said = explained(llama, *options, *FP32, *BLOCK)
    [how] = said["sparse prefill"]
    assert how.startswith("from position 300 on, by lines that cover 0.95 of each head's")
    # At least 1,024 of a kind: at this length all of them.
    assert said["its keys"][0].startswith("of a prompt of 1024 tokens 100.0% or more: how many")
    off = explained(llama, *options[:2], *FP32, *BLOCK)
    assert not {"sparse prefill", "its keys", "its time"} & set(off)


def test_what_budgets_keep_is_said(llama: str, tmp_path: Path) -> None:
    """Of 16,384 tokens, the first 4,096 dense: a sixteenth of the pairs."""
    file = tmp_path / "budgets.json"
    heads = {str(head): ["vertical_and_slash", 30, 100, 1] for head in range(4)}
    file.write_text(json.dumps([heads, heads]))
    sparse = {"sparse": "checkpoint", "sparse_budgets": str(file), "sparse_threshold": 4096}
    dca = {"dca": {"chunk_size": 2048, "local_size": 1024, **sparse}}
    options = ("--max-model-len", "16K", "--additional-config", json.dumps(dca))
    said = explained(llama, *options, *FP32, *BLOCK)
    assert said["sparse prefill"] == ["from position 4096 on, by the checkpoint's budgets"]
    [keys], [time] = said["its keys"], said["its time"]
    least, most = (float(share) for share in re.findall(r"([\d.]+)%", keys))
    # And 163 to 193 keys of the later rows, which have 10,240 before them on average.
    assert least == pytest.approx(6.25 + 100 * 12288 * 130 / 2**27, abs=0.1)
    assert least < most < least + 0.5
    fastest, slowest = (float(share) for share in re.findall(r"\d\.\d\d", time))
    # Weighed are 64 rows of a step of at most 1,024 tokens.
    assert 0.0625 + 0.9375 * SELECTING / 16 < fastest <= slowest < 0.3


def test_what_needs_the_weights_is_said(llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_dca.engine.backend import DcaBackend

    def prepare_model(*_: Any) -> None:
        raise NotImplementedError("Cannot copy out of meta tensor; no data!")

    monkeypatch.setattr(DcaBackend, "prepare_model", prepare_model)
    said = explained(llama, "--max-model-len", "1024", *FP32, *BLOCK)
    assert said["prefill by"][0].startswith("unknown")
    assert "shows only at a start" in said["warning"][0]
    assert said["DCA attends"] == ["2 of 2 layers: 0-1"]


def test_a_checkpoint_s_own_sizes_and_warnings(tmp_path: Path) -> None:
    sizes = {"chunk_size": 256, "local_size": 64, "original_max_position_embeddings": 64}
    model = checkpoints.write_config(
        tmp_path,
        "Qwen2Config",
        "Qwen2ForCausalLM",
        dual_chunk_attention_config={**sizes, "sparse_attention_enabled": True},
    )
    log = logging.getLogger("vllm"), logging.getLogger("vllm.plugins.dca")
    explained(str(model), *BLOCK)  # whatever vLLM sets up in its first use, is set up
    log[0].setLevel(logging.INFO)
    before = [(logger.level, logger.propagate, list(logger.handlers)) for logger in log]
    said = explained(str(model), "--max-model-len", "1024", *FP32, *BLOCK)
    assert said["chunk_size"] == ["256 tokens, the checkpoint's dual_chunk_attention_config"]
    assert said["temperature"] == ["grows from 64 tokens on"]
    over, sparse = said["warning"]
    assert over.startswith("chunk_size 256 is over the model's window of 128 tokens")
    assert "sparse" in sparse
    assert before == [(logger.level, logger.propagate, logger.handlers) for logger in log]


@pytest.mark.parametrize(
    ("max_model_len", "warning"),
    [
        ((), "128 tokens are within the trained window"),
        (("--max-model-len", "81"), "81 tokens are within the trained window"),
        (("--max-model-len", "80"), "80 tokens are within one chunk"),
        (("--max-model-len", "1025"), "8.0 times the window: past 8 times perplexity rises"),
    ],
)
def test_lengths_that_are_warned_of(
    max_model_len: tuple[str, ...], warning: str, llama: str
) -> None:
    [said] = explained(llama, *max_model_len, *FP32, *BLOCK)["warning"]
    assert said.startswith(warning)


def test_the_printed_command_starts_the_same(llama: str) -> None:
    given = {
        "--max-model-len": "2K",
        "--block-size": "32",
        "--additional-config": '{"dca": {"chunk_size": 96, "local_size": 32}}',
        "--hf-overrides": '{"rms_norm_eps": 1e-3}',
        "--dtype": "float16",
        "--kv-cache-dtype": "float16",
        "--tensor-parallel-size": "2",
        "--port": "8001",
    }
    given_words = [word for option in given.items() for word in option]
    said = explained(*given_words[:2], llama, *given_words[2:])
    vllm, serve, *words = shlex.split(said["start it"][0])
    assert (vllm, serve) == ("vllm", "serve")
    assert words[3:] == [*given_words[2:], "--attention-backend", "dca"]
    config = served(words).create_engine_config()
    assert config.model_config.model == llama
    assert config.model_config.max_model_len == 2048
    assert config.model_config.hf_config.rms_norm_eps == 1e-3
    assert str(config.model_config.dtype) == "torch.float16"
    assert config.cache_config.block_size == 32
    assert config.cache_config.cache_dtype == "float16"
    assert config.parallel_config.tensor_parallel_size == 2
    assert config.attention_config.backend.name == "DCA"
    settings = config.additional_config["dca"]
    assert said["chunk_size"] == [f"{settings['chunk_size']} tokens, --additional-config"]
    assert (settings["chunk_size"], settings["local_size"]) == (96, 32)


@pytest.mark.parametrize("auto", ["auto", "-1"])
def test_a_length_by_auto(auto: str, llama: str) -> None:
    said = explained(llama, "--max-model-len", auto, *FP32, *BLOCK)
    assert said["max_model_len"] == [
        "128 tokens, 1.0 times the window; by auto: a start lowers it to what its KV cache has "
        "room for"
    ]
    command = shlex.split(said["start it"][0])
    assert command[command.index("--max-model-len") + 1] == auto
    assert served(command[2:]).create_engine_config().model_config.original_max_model_len == -1
