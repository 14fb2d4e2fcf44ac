"""vLLM's engine features with DCA: each answers as the reference does past the window."""

import json
import math
from pathlib import Path

import pytest
import torch

from tests.helpers import checkpoints, rounding
from tests.helpers.answers import (
    ATOL,
    accepted,
    assert_close,
    drafted,
    generate,
    generate_from_embeddings,
    of_answer,
    of_prompt,
)
from tests.helpers.checkpoints import SIZES
from tests.helpers.companions import write_adapter, write_eagle
from tests.helpers.inprocess import engine, runner_of
from vllm_dca.reference.model import forward, prompt_logprobs

pytestmark = pytest.mark.each_minor

DCA = {"additional_config": {"dca": SIZES}}
PROMPT = checkpoints.tokens(300)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = checkpoints.write(tmp_path_factory.mktemp("llama"), "LlamaConfig")
    checkpoints.write_tokenizer(directory)
    return directory


def answered(model: Path, prompt: list[int], tokens: list[int]) -> torch.Tensor:
    """Log-probabilities of an answer by the reference."""
    return prompt_logprobs(model, prompt + tokens, **SIZES)[-len(tokens) :]


def test_torch_compile(llama: Path) -> None:
    from torch._dynamo.utils import counters

    counters.clear()
    with engine(llama, enforce_eager=False, **DCA) as llm:
        [output] = generate(llm, [PROMPT], prompt_logprobs=0, max_tokens=8)
    assert counters["stats"]["unique_graphs"]
    assert_close(of_prompt(output), prompt_logprobs(llama, PROMPT, **SIZES))
    tokens, logprobs = of_answer(output)
    assert_close(logprobs, answered(llama, PROMPT, tokens))


def test_samples_beams_and_reloaded_weights(llama: Path, tmp_path: Path) -> None:
    from vllm import SamplingParams
    from vllm.sampling_params import BeamSearchParams

    other = checkpoints.write(tmp_path, "LlamaConfig", seed=1)
    given = [{"prompt_token_ids": PROMPT}]
    params = SamplingParams(n=4, temperature=1.0, max_tokens=20, logprobs=0, detokenize=False)
    with engine(llama, skip_tokenizer_init=False, **DCA) as llm:
        [sampled] = llm.generate(given, params, use_tqdm=False)
        beam = BeamSearchParams(beam_width=3, max_tokens=8, ignore_eos=True)
        [searched] = llm.beam_search(given, beam)
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(other)})
        llm.reset_prefix_cache()
        [reloaded] = generate(llm, [PROMPT], prompt_logprobs=0)
    samples = {tuple(sample.token_ids): sample.logprobs for sample in sampled.outputs}
    assert len(samples) == 4
    for tokens, logprobs in samples.items():
        found = torch.tensor([at[t].logprob for at, t in zip(logprobs, tokens, strict=True)])
        assert_close(found, answered(llama, PROMPT, list(tokens)))
    beams = [beam.tokens[len(PROMPT) :] for beam in searched.sequences]
    assert len(set(map(tuple, beams))) == 3
    for beam, tokens in zip(searched.sequences, beams, strict=True):
        expected = answered(llama, PROMPT, tokens).sum()
        assert math.isclose(beam.cum_logprob, expected, abs_tol=len(tokens) * ATOL)
    assert_close(of_prompt(reloaded), prompt_logprobs(other, PROMPT, **SIZES))


def test_lora_adapters_beside_the_model(llama: Path, tmp_path: Path) -> None:
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    adapter, merged = write_adapter(llama, tmp_path)
    params = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    with engine(llama, enable_lora=True, max_lora_rank=8, **DCA) as llm:
        outputs = llm.generate(
            [{"prompt_token_ids": PROMPT}] * 2,
            params,
            lora_request=[LoRARequest("adapter", 1, str(adapter)), None],
            use_tqdm=False,
        )
    for output, model in zip(outputs, (merged, llama), strict=True):
        assert_close(of_prompt(output), prompt_logprobs(model, PROMPT, **SIZES))


def test_quantised_weights(tmp_path: Path) -> None:
    """4-bit groups, against the reference with the same weights."""
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    if not hasattr(torch.ops._C, "cpu_gemm_wna16"):
        pytest.skip("vLLM's library for this processor has no operator cpu_gemm_wna16")
    quantised, same = write_quantised(tmp_path)
    exact, tolerance = rounding.allowed(same, PROMPT, torch.bfloat16, signal=10, **SIZES)
    with engine(quantised, dtype="bfloat16", **DCA) as llm:
        [output] = generate(llm, [PROMPT], prompt_logprobs=0)
    assert (of_prompt(output) - exact).abs().mean() <= tolerance


def write_quantised(directory: Path) -> tuple[Path, Path]:
    """A checkpoint in compressed-tensors' format, and one of the weights that it stands for."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
    from safetensors.torch import load_file, save_file

    quantised, same = directory / "quantised", directory / "same"
    changes = {"hidden_size": 128, "head_dim": 32}  # what vLLM's kernel takes
    for path in (quantised, same):
        checkpoints.write(path, "LlamaConfig", **changes)
    packed, exact = {}, load_file(same / "model.safetensors")
    for name, weight in exact.items():
        if not name.endswith("_proj.weight"):
            packed[name] = weight
            continue
        groups = weight.unflatten(1, (-1, 32))
        scale = (groups.abs().amax(-1, keepdim=True) / 7).bfloat16()
        integers = (groups / scale.float()).round().clamp(-8, 7)
        exact[name] = (integers * scale.float()).flatten(1)
        packed[f"{name}_packed"] = pack_to_int32(integers.flatten(1).to(torch.int8), 4)
        packed[f"{name}_scale"] = scale[..., 0].contiguous()
        packed[f"{name}_shape"] = torch.tensor(weight.shape)
    for tensors, path in ((packed, quantised), (exact, same)):
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((quantised / "config.json").read_text())
    weights = {"num_bits": 4, "type": "int", "symmetric": True}
    weights |= {"strategy": "group", "group_size": 32}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }
    (quantised / "config.json").write_text(json.dumps(config))
    return quantised, same


def test_embeddings_and_pooling(llama: Path) -> None:
    _, hidden = forward(llama, PROMPT, **SIZES)
    _, ordinary = forward(llama, PROMPT)
    expected = torch.nn.functional.normalize(hidden, dim=-1)
    assert (torch.nn.functional.normalize(ordinary, dim=-1) - expected)[-1].abs().max() > 0.1
    options = {"runner": "pooling", "convert": "embed", "skip_tokenizer_init": False, **DCA}
    with engine(llama, pooler_config={"task": "token_embed"}, **options) as llm:
        [every] = llm.encode(
            [{"prompt_token_ids": PROMPT}], pooling_task="token_embed", use_tqdm=False
        )
    assert_close(every.outputs.data, expected)


def test_prompts_as_embeddings(llama: Path) -> None:
    with engine(llama, enable_prompt_embeds=True, **DCA) as llm:
        output = generate_from_embeddings(llm, llama, PROMPT, max_tokens=10)
    tokens, logprobs = of_answer(output)
    assert_close(logprobs, answered(llama, PROMPT, tokens))


def test_all_that_a_layer_reads_survives_sleep(llama: Path, tmp_path: Path) -> None:
    """vLLM's sleep mode, on GPUs only, frees all that loading allocated, buffers saved."""

    def lost(model: torch.nn.Module) -> list[str]:
        saved = {tensor.data_ptr() for tensor in model.buffers()}
        read = {
            f"{name} {index}": tensor.data_ptr()
            for name, layer in model.named_modules()
            if hasattr(layer, "impl")
            for index, tensor in enumerate(
                (
                    layer.impl.prepared.rotation.cos_sin,
                    layer.impl.sparse.rule.verticals,
                    layer.impl.sparse.rule.slashes,
                )
            )
        }
        assert read
        return [name for name, place in read.items() if place not in saved]

    heads = {str(head): ["vertical_and_slash", 40, 110, 1] for head in range(4)}
    budgets = tmp_path / "budgets.json"
    budgets.write_text(json.dumps([heads] * 2))
    sparse = {"sparse": "checkpoint", "sparse_budgets": str(budgets)}
    with engine(
        llama,
        additional_config={"dca": {"chunk_size": 384, "local_size": 128, **sparse}},
        max_num_batched_tokens=256,
    ) as llm:
        assert llm.apply_model(lost) == [[]]


def test_a_kv_connector_brings_keys_from_another_engine(llama: Path, tmp_path: Path) -> None:
    from vllm.config import KVTransferConfig

    shared = KVTransferConfig(
        kv_connector="ExampleConnector",
        kv_role="kv_both",
        kv_connector_extra_config={"shared_storage_path": str(tmp_path)},
    )
    # It stores what one step has.
    options = {"kv_transfer_config": shared, "max_num_batched_tokens": 1024, **DCA}
    for cached in (0, 288):
        with engine(llama, **options) as llm:
            [output] = generate(llm, [PROMPT], max_tokens=10)
        assert output.num_cached_tokens == cached
        tokens, logprobs = of_answer(output)
        assert_close(logprobs, answered(llama, PROMPT, tokens))


def test_evicted_pages_are_computed_again(llama: Path) -> None:
    """In a cache of 720 tokens, two prompts drive out what it has of a third."""
    prompts = [checkpoints.tokens(300, seed) for seed in range(3)]
    options = {"num_gpu_blocks_override": 45, "max_model_len": 512, **DCA}
    with engine(llama, **options) as llm:
        for prompt in (*prompts, prompts[0]):
            [output] = generate(llm, [prompt], max_tokens=4)
            tokens, logprobs = of_answer(output)
            assert_close(logprobs, answered(llama, prompt, tokens))
            assert output.num_cached_tokens < 288
        [kept] = generate(llm, [prompts[0]])
        assert kept.num_cached_tokens == 288


@pytest.mark.parametrize("budget", [33, 97])
def test_prefills_cut_at_odd_places_among_many_requests(llama: Path, budget: int) -> None:
    prompts = [checkpoints.tokens(1 + 26 * n, n) for n in range(15)]
    with engine(llama, max_num_batched_tokens=budget, max_num_seqs=32, **DCA) as llm:
        outputs = generate(llm, prompts, max_tokens=6)
    for prompt, output in zip(prompts, outputs, strict=True):
        tokens, logprobs = of_answer(output)
        assert_close(logprobs, answered(llama, prompt, tokens))


def test_a_draft_model_drafts_past_its_window(llama: Path) -> None:
    """The model drafts for itself: if its layers attend as they should, each draft is right."""
    draft = {"method": "draft_model", "model": str(llama), "num_speculative_tokens": 3}
    prompts = [PROMPT, checkpoints.tokens(60)]
    with engine(llama, speculative_config=draft, **DCA) as llm:
        outputs = generate(llm, prompts, max_tokens=30)
        assert accepted(llm) == drafted(llm) > 30
    for prompt, output in zip(prompts, outputs, strict=True):
        tokens, logprobs = of_answer(output)
        assert_close(logprobs, answered(llama, prompt, tokens))


def test_eagle_heads_are_attended_by_dca(llama: Path, tmp_path: Path) -> None:
    """EAGLE-3's, which read three layers; test_sparse has EAGLE's."""
    head = write_eagle(tmp_path, "eagle3")
    draft = {"method": "eagle3", "model": str(head), "num_speculative_tokens": 3}
    with engine(llama, speculative_config=draft, **DCA) as llm:
        [output] = generate(llm, [PROMPT], max_tokens=30)
        assert drafted(llm) > 0
        [layer] = [
            module
            for module in runner_of(llm).drafter.model.modules()
            if hasattr(module, "attn_backend")
        ]
        assert layer.attn_backend.get_name() == "DCA"
    tokens, logprobs = of_answer(output)
    assert_close(logprobs, answered(llama, PROMPT, tokens))
