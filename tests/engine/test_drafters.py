"""Drafters past the window: a multi-token predictor's layer is DCA's too; Medusa has none."""

import json
from pathlib import Path
from typing import Any, NamedTuple, get_args

import pytest
import torch
from vllm.config.speculative import SpeculativeMethod

from tests.helpers import checkpoints, sparse_served
from tests.helpers.answers import accepted, assert_close, drafted, generate, of_answer
from tests.helpers.checkpoints import SIZES
from tests.helpers.children import Children
from tests.helpers.inprocess import engine, runner_of
from tests.helpers.runners import under
from vllm_dca.reference.model import forward, prompt_logprobs

SPECULATIVE = {"method": "mtp", "num_speculative_tokens": 1}
# A token whose embedding is zero, as the drafter takes the first one to be.
NOTHING = 2
ANSWER = 40
STEP = 100  # tokens of a prompt that are read at once


class Family(NamedTuple):
    """How a model with a drafter of one layer is built, and what its tensors are called.

    Attributes:
        config: a class of transformers; `changes` of its attributes.
        architecture: its name in vLLM.
        layer: what the names of the drafter's layer start with.
        of_tokens: its norm over the next token's embedding; `of_hidden`, over what the model
            left; `projection`, of both to one; `last`, its last norm, and `head`, if it has.
        tokens_first: whether the projection's first half is of the embedding.
        neutral: the weight of a norm that only divides by the mean square.
        count: its attribute of the config that says how many layers the drafter has.
        pairs: whether the model rotates pairs of entries where the drafter rotates halves.
    """

    config: str
    changes: dict[str, Any]
    architecture: str
    layer: str
    of_tokens: str
    of_hidden: str
    projection: str
    tokens_first: bool
    last: str = ""
    head: str = ""
    neutral: float = 1.0
    count: str = "num_nextn_predict_layers"
    pairs: bool = False


QWEN = {
    "layer": "mtp.layers.0.",
    "of_tokens": "mtp.pre_fc_norm_embedding",
    "of_hidden": "mtp.pre_fc_norm_hidden",
    "projection": "mtp.fc",
    "tokens_first": True,
    "last": "mtp.norm",
    "neutral": 0.0,
}
FULL = {"layer_types": ["full_attention"], "head_dim": 64}
EXPERTS = {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
FAMILIES = {
    "MiMo": Family(
        "Qwen2Config",
        {},
        "MiMoForCausalLM",
        "model.mtp_layers.0.",
        "model.mtp_layers.0.token_layernorm",
        "model.mtp_layers.0.hidden_layernorm",
        "model.mtp_layers.0.input_proj",
        tokens_first=False,
        last="model.mtp_layers.0.final_layernorm",
    ),
    "GLM-4.5": Family(
        "Glm4MoeConfig",
        {**EXPERTS, "first_k_dense_replace": 0},
        "Glm4MoeForCausalLM",
        "model.layers.1.",
        "model.layers.1.enorm",
        "model.layers.1.hnorm",
        "model.layers.1.eh_proj",
        tokens_first=True,
        last="model.layers.1.shared_head.norm",
        head="model.layers.1.shared_head.head",
    ),
    "Qwen3-Next": Family(
        "Qwen3NextConfig",
        {**FULL, **checkpoints.MOE, "shared_expert_intermediate_size": 32},
        "Qwen3NextForCausalLM",
        **QWEN,
    ),
    "Qwen3.5": Family(
        "Qwen3_5TextConfig",
        FULL,
        "Qwen3_5ForCausalLM",
        **QWEN,
        count="mtp_num_hidden_layers",
    ),
    # The drafter's layer has no experts and no norm after it.
    "Ernie 4.5": Family(
        "Ernie4_5_MoeConfig",
        {"moe_layer_start_index": 1, "moe_num_experts": 4, "moe_k": 2},
        "Ernie4_5_MoeForCausalLM",
        "model.mtp_block.0.",
        "model.mtp_emb_norm.0",
        "model.mtp_hidden_norm.0",
        "model.mtp_linear_proj.0",
        tokens_first=True,
        pairs=True,
    ),
}


def write_with_drafter(directory: Path, family: Family) -> Path:
    """One layer, and a drafter that is the same layer over the tokens alone.

    It reads the text from its second token on. So what it drafts is what the model would say
    to that text.
    """
    import safetensors.torch

    changes = {**family.changes, "num_hidden_layers": 1, family.count: 1}
    checkpoints.write(directory, family.config, **changes)
    path = directory / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    embeddings = tensors["model.embed_tokens.weight"]
    # So that the drafter's norm over them changes nothing.
    embeddings /= embeddings.square().mean(-1, keepdim=True).sqrt()
    embeddings[NOTHING] = 0
    size = embeddings.shape[1]
    copies = {
        name.replace("model.layers.0.", family.layer): tensor.clone()
        for name, tensor in tensors.items()
        if name.startswith("model.layers.0.")
    }
    copies[f"{family.of_tokens}.weight"] = torch.full((size,), family.neutral)
    copies[f"{family.of_hidden}.weight"] = torch.full((size,), family.neutral)
    if family.last:
        copies[f"{family.last}.weight"] = tensors["model.norm.weight"].clone()
    else:
        # Which token is likeliest does not hang on a norm of one weight.
        tensors["model.norm.weight"][:] = family.neutral
    if family.pairs:
        for name in (f"{family.layer}self_attn.{each}_proj.weight" for each in "qk"):
            rows = copies[name].unflatten(0, (-1, checkpoints.SHAPE["head_dim"] // 2, 2))
            copies[name] = rows.transpose(1, 2).flatten(0, 2).contiguous()
    if family.head:
        copies[f"{family.head}.weight"] = tensors["lm_head.weight"].clone()
    halves = [torch.zeros(size, size), torch.eye(size)]
    if family.tokens_first:
        halves.reverse()
    copies[f"{family.projection}.weight"] = torch.cat(halves, dim=1)
    safetensors.torch.save_file({**tensors, **copies}, path, metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    config |= {"architectures": [family.architecture], family.count: 1}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="module")
def mimo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_with_drafter(tmp_path_factory.mktemp("mimo"), FAMILIES["MiMo"])


def by_reference(
    model: Path, prompt: list[int], answer: list[int], **sizes: int
) -> tuple[int, int]:
    """How many drafts there are, and how many of them are accepted."""
    text = prompt + answer
    logits, _ = forward(model, [NOTHING, *text[2:]], **sizes)
    drafts = [None, None, *logits.argmax(-1).tolist()]  # by their place in the text
    place, made, right = len(prompt) + 1, 0, 0
    while place < len(text):
        made += 1
        is_accepted = drafts[place] == text[place]
        right += is_accepted
        place += 2 if is_accepted else 1
    return made, right


@pytest.mark.parametrize(
    ("name", "length"),
    [
        ("MiMo", 20),
        pytest.param("MiMo", 300, marks=pytest.mark.each_minor),
        *((name, 300) for name in FAMILIES if name not in ("MiMo", "Qwen3.5")),
    ],
    ids=lambda value: str(value),
)
def test_what_is_drafted_is_what_the_layer_says_with_dca(
    name: str, length: int, mimo: Path, tmp_path: Path
) -> None:
    model = mimo if name == "MiMo" else write_with_drafter(tmp_path, FAMILIES[name])
    assert_drafts_are_the_layer_s(model, length)


def test_a_predictor_of_a_module_that_knows_images(tmp_path: Path, children: Children) -> None:
    """Qwen3.5, whose positions have three axes."""
    children.run("vision", _drafts_of_qwen3_5, tmp_path)


def _drafts_of_qwen3_5(directory: Path) -> None:
    assert_drafts_are_the_layer_s(write_with_drafter(directory, FAMILIES["Qwen3.5"]), 300)


def assert_drafts_are_the_layer_s(model: Path, length: int) -> None:
    """As many are accepted as the reference says, and past the window without DCA others."""
    options = {"additional_config": {"dca": SIZES}, "speculative_config": SPECULATIVE}
    # A predictor that reads the first token's embedding, too, meets nothing there.
    prompts = [[3, NOTHING, *checkpoints.tokens(length, seed)] for seed in range(4)]
    for prompt in prompts:
        # Where a prefill is cut, vLLM's drafter reads the prompt's last token for the next one.
        for cut in range(STEP, len(prompt), STEP):
            prompt[cut] = prompt[-1]
    with engine(model, max_num_batched_tokens=STEP, **options) as llm:
        modules = runner_of(llm).drafter.model.modules()
        [layer] = [module for module in modules if hasattr(module, "attn_backend")]
        assert layer.attn_backend.get_name() == "DCA"
        # One after the other, so that it is known where they are cut.
        outputs = [generate(llm, [prompt], max_tokens=ANSWER)[0] for prompt in prompts]
        right = accepted(llm)
        assert drafted(llm) > 0
    with_dca, without = 0, 0
    for prompt, output in zip(prompts, outputs, strict=True):
        tokens, logprobs = of_answer(output)
        expected = prompt_logprobs(model, prompt + tokens, **SIZES)[-len(tokens) :]
        assert_close(logprobs, expected)
        with_dca += by_reference(model, prompt, tokens, **SIZES)[1]
        without += by_reference(model, prompt, tokens)[1]
    # A request's last draft may not be needed any more.
    assert abs(right - with_dca) <= len(prompts), (right, with_dca)
    assert with_dca > 2 * len(prompts)
    if length > SIZES["chunk_size"]:
        assert abs(right - without) > 2 * len(prompts), (right, without)


@pytest.mark.parametrize("mode", ["auto", "checkpoint"])
def test_a_predictor_stays_dense_beside_sparse_prefill(mode: str, tmp_path: Path) -> None:
    """Its layer has the number of the model's first one, whose budgets are not for it."""
    model = write_with_drafter(tmp_path, FAMILIES["Qwen3-Next"])
    file = tmp_path / "budgets.json"
    budget = ["vertical_and_slash", 64, 128, 1.0]
    file.write_text(json.dumps([{str(head): budget for head in range(4)}]))
    sparse = {"sparse_budgets": str(file)} if mode == "checkpoint" else {}
    given = sparse_served.options(sparse=mode, **sparse)
    with engine(model, speculative_config=SPECULATIVE, **given) as llm:
        generate(llm, [sparse_served.PROMPT], max_tokens=4)
        assert drafted(llm) > 0
        runner = runner_of(llm)
        rules = [
            [module.impl.sparse for module in each.modules() if hasattr(module, "attn_backend")]
            for each in (runner.model, runner.drafter.model)
        ]
    [[rule], [none]] = rules
    assert rule is not None
    assert none is None


@under("V2")
def test_a_drafter_keeps_its_own_windows(tmp_path: Path) -> None:
    """Beside a model without any. Under V1 vLLM drafts with layers of one kind only."""
    model = checkpoints.write(tmp_path / "model", "LlamaConfig", head_dim=32)
    drafter = checkpoints.write(
        tmp_path / "drafter",
        "Gemma3TextConfig",
        head_dim=32,
        sliding_window=40,
        layer_types=["sliding_attention", "full_attention"],
    )
    draft = {"method": "draft_model", "model": str(drafter), "num_speculative_tokens": 2}
    options = {"additional_config": {"dca": SIZES}, "speculative_config": draft}
    options |= {"block_size": 32, "num_gpu_blocks_override": 300}
    prompt = checkpoints.tokens(300)
    with engine(model, **options) as llm:
        [output] = generate(llm, [prompt], max_tokens=8)
        assert drafted(llm) > 0
        layers = runner_of(llm).vllm_config.compilation_config.static_forward_context
        assert [
            layer.attn_backend.get_name()
            for name, layer in layers.items()
            if name.startswith("draft_model.")
        ] == ["CPU_ATTN", "DCA"]
    tokens, logprobs = of_answer(output)
    expected = prompt_logprobs(model, prompt + tokens, **SIZES)[-len(tokens) :]
    assert_close(logprobs, expected)


@pytest.mark.skipif("medusa" not in get_args(SpeculativeMethod), reason="vLLM 0.33 has none")
def test_medusa_heads_draft_from_what_dca_left(mimo: Path, tmp_path: Path) -> None:
    """A head that changes nothing drafts the model's last answer again."""
    import safetensors.torch

    tensors = safetensors.torch.load_file(mimo / "model.safetensors")
    vocab, size = tensors["lm_head.weight"].shape
    heads = {
        "blocks.0.layers.0.weight": torch.zeros(size, size),
        "lm_heads.0.weight": tensors["lm_head.weight"],
    }
    safetensors.torch.save_file(heads, tmp_path / "model.safetensors")
    config = {"model_type": "medusa", "architectures": ["MedusaModel"], "num_heads": 1}
    config |= {"hidden_size": size, "vocab_size": vocab}
    (tmp_path / "config.json").write_text(json.dumps(config))
    medusa = {"method": "medusa", "model": str(tmp_path), "num_speculative_tokens": 1}
    prompt = checkpoints.tokens(300)
    options = {"additional_config": {"dca": SIZES}, "speculative_config": medusa}
    with engine(mimo, **options) as llm:
        [output] = generate(llm, [prompt], max_tokens=ANSWER)
        assert drafted(llm) > 0
    tokens, logprobs = of_answer(output)
    expected = prompt_logprobs(mimo, prompt + tokens, **SIZES)[-len(tokens) :]
    assert_close(logprobs, expected)
