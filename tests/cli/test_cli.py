"""`python -m vllm_dca`: what it prints against independent arithmetic and real engines."""

import functools
import importlib.util
import json
import logging
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import Result

from tests.conftest import DEMO_MODEL
from tests.helpers import checkpoints
from tests.helpers.command_line import explained, run, served
from tests.helpers.inprocess import engine, in_a_child
from vllm_dca.cli.picture import relative_positions
from vllm_dca.cpu import compiled
from vllm_dca.cpu.build import BuildError
from vllm_dca.cpu.processor import Processor
from vllm_dca.engine import devices
from vllm_dca.method.geometry import ChunkGeometry

pytestmark = pytest.mark.each_minor

BLOCK = ("--block-size", "16")
# No processor is slow in it, so none is warned of.
FP32 = ("--dtype", "float32")
UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def kv_bytes(said: dict[str, list[str]]) -> list[float]:
    """Of a token, and of a request."""
    sizes = re.findall(r"([\d.e+]+) (bytes|KiB|MiB|GiB)", said["KV cache"][0])
    return [float(number) * UNITS[unit] for number, unit in sizes]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(
        checkpoints.write_config(
            tmp_path_factory.mktemp("llama"), "LlamaConfig", "LlamaForCausalLM"
        )
    )


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
    [keys], [time] = said["its keys"], said["its time"]
    least, most = (float(share) for share in re.findall(r"([\d.]+)%", keys))
    # And 163 to 193 keys of the later rows, which have 10,240 before them on average.
    assert least == pytest.approx(6.25 + 100 * 12288 * 130 / 2**27, abs=0.1)
    assert least < most < least + 0.5
    fastest, slowest = (float(share) for share in re.findall(r"\d\.\d\d", time))
    # Weighed are 64 rows of a step of at most 1,024 tokens.
    assert 0.0625 + 0.9375 * 2 / 16 < fastest <= slowest < 0.3


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
        (("--max-model-len", "1025"), "8.0 times the window: DCA's authors list"),
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
    }
    said = explained(llama, *(word for option in given.items() for word in option))
    vllm, serve, *words = shlex.split(said["start it"][0])
    assert (vllm, serve) == ("vllm", "serve")
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
    config = served(shlex.split(said["start it"][0])[2:]).create_engine_config()
    assert config.model_config.original_max_model_len == -1


# A scaling that DCA does not know.
DEEPSEEK = json.dumps(
    {
        "rope_parameters": {
            "rope_type": "deepseek_yarn",
            "rope_theta": 1e4,
            "factor": 2.0,
            "original_max_position_embeddings": 64,
        }
    }
)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--additional-config", '{"dca": {"size": 64}}'), 'unknown under "dca": size'),
        (("--block-size", "128"), "Pass --block-size 64 or smaller"),
        (("--tensor-parallel-size", "3"), "must be divisible by tensor parallel size"),
        (("--dtype", "float7"), "Input should be 'auto', 'half'"),
        (
            ("--hf-overrides", DEEPSEEK),
            "its rotary embedding is a DeepseekScalingRotaryEmbedding",
        ),
    ],
)
def test_refusals_are_messages(options: tuple[str, ...], message: str, llama: str) -> None:
    result = run("explain", llama, *BLOCK, *options)
    assert result.exit_code == 1
    assert message in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("config", "architecture", "message"),
    [
        ("OPTConfig", "OPTForCausalLM", "models without rotary positions"),
        ("Cohere2Config", "Cohere2ForCausalLM", "it has no rotary positions"),
    ],
)
def test_models_that_are_refused(
    config: str, architecture: str, message: str, tmp_path: Path
) -> None:
    changes = {
        "OPTConfig": {"word_embed_proj_dim": 64},
        "Cohere2Config": {
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 32,
        },
    }
    model = checkpoints.write_config(tmp_path, config, architecture, **changes[config])
    result = run("explain", str(model), *BLOCK)
    assert result.exit_code == 1
    assert message in result.stderr
    assert "another attention backend" in result.stderr


@pytest.mark.parametrize(
    "wrong",
    [
        ("--max-model-len", "long"),
        ("--max-model-len", "0"),
        ("--max-model-len", "-2"),
        ("--max-model-len", "1.5K"),
        ("--additional-config", "[1]"),
        ("--hf-overrides", "{"),
        ("--window", "1"),
    ],
)
def test_wrong_usage(wrong: tuple[str, ...], llama: str) -> None:
    result = run("explain", llama, *wrong)
    assert result.exit_code == 2
    assert wrong[0] in result.stderr


def test_a_checkpoint_that_is_not_there() -> None:
    result = run("explain", "/no/such/directory")
    assert result.exit_code == 1
    assert "/no/such/directory" in result.stderr


def test_as_a_process_it_prints_nothing_else(llama: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vllm_dca", "explain", llama, "--block-size", "16"]
    # Elsewhere than in the project's folder.
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == run("explain", llama, *BLOCK).stdout
    assert "\x1b" not in done.stdout


def test_the_matrix_of_a_small_geometry() -> None:
    # By hand from the paper's table: chunks of 4, two local tokens, c = 6.
    expected = [
        [0],
        [1, 0],
        [2, 1, 0],
        [3, 2, 1, 0],
        [4, 3, 2, 1, 0],
        [5, 4, 3, 2, 1, 0],
        [6, 5, 4, 3, 2, 1, 0],
        [6, 5, 4, 3, 3, 2, 1, 0],
        [6, 5, 4, 3, 4, 3, 2, 1, 0],
        [6, 5, 4, 3, 5, 4, 3, 2, 1, 0],
        [6, 5, 4, 3, 6, 5, 4, 3, 2, 1, 0],
    ]
    length = len(expected)
    taken, matrix = relative_positions(ChunkGeometry(6, 2), length)
    assert taken.tolist() == list(range(length))
    padded = [row + [np.nan] * (length - len(row)) for row in expected]
    np.testing.assert_array_equal(matrix, np.array(padded))


def test_the_matrix_of_a_long_sequence_is_a_sample() -> None:
    geometry = ChunkGeometry(6144, 1024)
    taken, matrix = relative_positions(geometry, 20480, side=100)
    assert (taken[0], taken[-1], len(taken)) == (0, 20479, 100)
    assert matrix.shape == (100, 100)
    assert np.nanmax(matrix) <= 6144
    assert np.nanmin(matrix) == 0
    close = np.flatnonzero(taken < geometry.chunk_len)
    np.testing.assert_array_equal(
        np.tril(matrix[np.ix_(close, close)]),
        np.tril(taken[close][:, None] - taken[close][None, :]),
    )


def test_a_picture(llama: str, tmp_path: Path) -> None:
    file = tmp_path / "dca.png"
    explained(llama, "--max-model-len", "1024", *BLOCK, "--plot", str(file))
    assert file.read_bytes().startswith(b"\x89PNG\r\n")
    result = run("explain", llama, *BLOCK, "--plot", str(tmp_path / "dca.txt"))
    assert result.exit_code == 1
    assert "Format 'txt' is not supported" in result.stderr


def test_a_picture_without_matplotlib(
    llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    result = run("explain", llama, "--plot", str(tmp_path / "dca.png"))
    assert result.exit_code == 1
    assert "pip install matplotlib" in result.stderr


def findings(result: Result) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {"ok": [], "problem": [], "note": []}
    for line in result.stdout.splitlines():
        found[line[:9].rstrip()].append(line[9:])
    return found


def test_doctor_finds_nothing_here() -> None:
    import vllm

    result = run("doctor")
    assert result.exit_code == 0, result.output
    found = findings(result)
    assert found["problem"] == []
    said = "\n".join(found["ok"])
    for part in (
        f"vLLM {vllm.__version__}",
        "vLLM loads the plugin dca",
        "platform c",
        "prefill by",
        "shims in force: pickle_by_name, select_on_cpu",
        "patches in vLLM instead of shims: none",
        "dca selects vllm_dca.engine.backend.DcaBackend",
    ):
        assert part in said


def test_doctor_on_an_untested_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm

    from vllm_dca.engine import shims

    monkeypatch.setattr(vllm, "__version__", "0.99.0")
    # In a new process nothing is cached.
    monkeypatch.setattr(shims, "apply", shims.apply.__wrapped__)
    result = run("doctor")
    assert result.exit_code == 1
    version, unavailable = findings(result)["problem"]
    assert version.startswith("vLLM 0.99.0 is not tested: install 0.32, 0.33")
    assert unavailable.startswith("DCA cannot be made available: vLLM 0.99.0 is installed")
    fitting = [line for line in findings(result)["note"] if line.endswith("fits this vLLM")]
    assert len(fitting) == len(shims.SHIMS)
    refused = run("explain", "any")
    assert refused.exit_code == 1
    assert "vLLM 0.99.0 is installed, and tested are 0.32, 0.33" in refused.stderr


def test_doctor_where_what_a_shim_replaces_has_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    from vllm_dca.engine import shims

    monkeypatch.setattr(vllm, "__version__", "0.99.0")
    monkeypatch.setattr(shims, "apply", shims.apply.__wrapped__)
    monkeypatch.setattr(EngineArgs, "create_model_config", lambda self, more: None)
    monkeypatch.delattr(BaseModelLoader, "create_model")
    notes = findings(run("doctor"))["note"]
    assert any(
        "EngineArgs.create_model_config takes (self, more) in vLLM 0.99.0, and the shim "
        "extend_context was written for (self)" in line
        for line in notes
    )
    assert any(
        "create_model is gone from vLLM 0.99.0, and the shim prepare" in n for n in notes
    )
    assert "the shim select_on_cpu fits this vLLM" in notes


def test_doctor_where_vllm_keeps_the_plugin_out(monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm.envs

    vllm.envs.disable_envs_cache()  # an engine in this process may have turned it on
    monkeypatch.setenv("VLLM_PLUGINS", "another,one")
    result = run("doctor")
    assert result.exit_code == 1
    [problem] = findings(result)["problem"]
    assert problem.startswith("VLLM_PLUGINS=another,one keeps the plugin dca out")
    monkeypatch.setenv("VLLM_PLUGINS", "another,dca")
    assert run("doctor").exit_code == 0


def test_doctor_without_the_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.metadata

    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **_: ())
    result = run("doctor")
    assert result.exit_code == 1
    plugin, metrics = findings(result)["problem"]
    assert "is not installed: pip install" in plugin
    assert "is not installed, and this version's is vllm_dca.engine.metrics:" in metrics


def test_doctor_on_an_installation_from_before_the_code_moved(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import importlib.metadata

    found = importlib.metadata.entry_points
    old = importlib.metadata.EntryPoint(
        "dca", "vllm_dca.metrics:DcaStatLogger", "vllm.stat_logger_plugins"
    )

    def entry_points(**chosen: str) -> Any:
        return (old,) if chosen["group"] == old.group else found(**chosen)

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    result = run("doctor")
    assert result.exit_code == 1
    [problem] = findings(result)["problem"]
    assert "vllm_dca.metrics:DcaStatLogger, and this version's is vllm_dca.engine" in problem


def test_doctor_where_nothing_can_prefill(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_dca.engine import choice
    from vllm_dca.method.provider import Needs, UnusableProviderError

    def unusable(needs: Needs) -> Any:
        raise UnusableProviderError("it is out of order")

    monkeypatch.setitem(choice.PROVIDERS, "cpu", {"torch": unusable})
    monkeypatch.setitem(choice.PROVIDERS, "cuda", {"torch": unusable})
    result = run("doctor")
    assert result.exit_code == 1
    found = findings(result)
    assert "prefill by torch: no, because it is out of order" in found["note"]
    assert len(found["problem"]) == 1


def test_doctor_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def library() -> None:
        raise BuildError("no C++ compiler")

    monkeypatch.setattr(compiled, "library", library)
    result = run("doctor")
    assert result.exit_code == 0
    found = findings(result)
    note = "prefill by compiled: no, because it cannot be compiled here (no C++ compiler)"
    assert note in found["note"]
    assert any(line.startswith("prefill by torch") for line in found["ok"])


LAPTOP = Processor("AVX2", None, torch.float32)
SERVER = Processor("AVX512", "AMX", torch.bfloat16)


@pytest.mark.parametrize(
    ("here", "advice"),
    [
        (
            LAPTOP,
            "with AVX2, no instruction that multiplies bfloat16: serve with --dtype float32",
        ),
        (SERVER, "with AVX512, which multiplies bfloat16 by AMX: serve with --dtype bfloat16"),
    ],
)
def test_doctor_says_which_dtype_to_serve_in(
    here: Processor, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "processor", lambda: here)
    [said] = [line for line in findings(run("doctor"))["ok"] if line.startswith("processor")]
    assert advice in said


@pytest.mark.parametrize(
    ("here", "dtype", "faster"),
    [
        (LAPTOP, "bfloat16", "float32"),
        (LAPTOP, "float16", "float32"),
        (SERVER, "float16", "bfloat16"),
        (LAPTOP, "float32", None),
        (SERVER, "float32", None),
        (SERVER, "bfloat16", None),
    ],
)
def test_a_dtype_that_the_processor_does_not_multiply_is_warned_of(
    here: Processor, dtype: str, faster: str | None, llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "processor", lambda: here)
    said = explained(llama, "--max-model-len", "1K", "--dtype", dtype, *BLOCK)
    warnings = said.get("warning", [])
    assert [f"--dtype {faster} is faster here" in line for line in warnings] == (
        [True] if faster else []
    )


def test_doctor_where_vllm_selects_another(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.attention import selector

    monkeypatch.setattr(selector, "get_attn_backend", lambda *_: dict)
    result = run("doctor")
    assert result.exit_code == 1
    [problem] = findings(result)["problem"]
    assert problem.startswith("--attention-backend dca selects builtins.dict, not vllm_dca.")
