"""M-RoPE: its three axes are equal for text, which is served where nothing else can come."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from scripts.common.server import Server
from tests.helpers import checkpoints, rehearsal, vision
from tests.helpers.answers import ATOL, generate, of_answer, of_prompt
from tests.helpers.checkpoints import SIZES
from tests.helpers.children import Children
from tests.helpers.command_line import served
from tests.helpers.inprocess import engine
from tests.helpers.runners import under
from vllm_dca.reference.model import prompt_logprobs

CHUNKED = {"mrope_section": [2, 3, 3], "rope_theta": 1e4}
INTERLEAVED = {"mrope_section": [4, 2, 2], "mrope_interleaved": True, "rope_theta": 1e4}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
PIXEL = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5Erk"
    "Jggg=="
)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "chunked": ("Qwen2_5_VLConfig", {**CHUNKED, "rope_type": "default"}),
    "interleaved, with YaRN": ("Qwen3VLConfig", {**INTERLEAVED, **YARN}),
}


@pytest.fixture
def vision_for_children(monkeypatch: pytest.MonkeyPatch) -> None:
    vision.for_children_of(monkeypatch)


def test_text_past_the_window(tmp_path: Path, children: Children) -> None:
    children.run("vision", _text_past_the_window, tmp_path)


def _text_past_the_window(directory: Path) -> None:
    """Prefills in pieces, a fresh and a cached prefix, tokens one by one."""
    from vllm.model_executor.layers.rotary_embedding import MRotaryEmbedding

    prompt = checkpoints.tokens(300)
    for name, (family, rope) in MODELS.items():
        model = checkpoints.write(directory / family, family, rope_parameters=rope)
        expected = prompt_logprobs(model, prompt, **SIZES)
        ordinary = prompt_logprobs(model, prompt)
        assert (ordinary - expected).abs().max() > 100 * ATOL, name
        options = {"additional_config": {"dca": SIZES}, "language_model_only": True}
        with engine(model, **options) as llm:
            assert llm.llm_engine.model_config.uses_mrope
            [kinds] = llm.apply_model(
                lambda model: [
                    type(layer.self_attn.rotary_emb)
                    for layer in model.language_model.model.layers
                ]
            )
            assert kinds == [MRotaryEmbedding] * 2
            [read] = generate(llm, [prompt], prompt_logprobs=0)
            answers = [generate(llm, [prompt], max_tokens=12)[0] for _ in range(2)]
        assert (of_prompt(read).double() - expected).abs().max() <= ATOL, name
        assert answers[1].num_cached_tokens >= 256
        for answer in answers:
            tokens, logprobs = of_answer(answer)
            of_answers = prompt_logprobs(model, prompt + tokens, **SIZES)[-12:]
            assert (logprobs.double() - of_answers).abs().max() <= ATOL, name


@pytest.mark.usefixtures("vision_for_children")
@under("V1", "V2", apart=("V1", "V2"), nightly=("V1",))
def test_text_by_the_gpu_s_code(tmp_path: Path) -> None:
    """In pieces, and after a cached prefix."""
    rope = {**INTERLEAVED, **YARN}
    model = checkpoints.write(tmp_path, "Qwen3VLConfig", rope_parameters=rope)
    prompt = checkpoints.tokens(100)
    with engine(model, language_model_only=True, **rehearsal.OPTIONS) as llm:
        assert llm.llm_engine.model_config.uses_mrope
        outputs = [generate(llm, [prompt], max_tokens=3)[0] for _ in range(2)]
    assert [output.num_cached_tokens for output in outputs] == [0, 96]
    for output in outputs:
        rehearsal.assert_agrees(model, prompt, output)


def test_images_are_refused_in_words_that_help(tmp_path: Path, children: Children) -> None:
    children.run("vision", _images_are_refused, tmp_path)


def _images_are_refused(directory: Path) -> None:
    changes = {
        "layer_types": ["linear_attention", "full_attention"],
        "rope_parameters": {**INTERLEAVED, "rope_type": "default"},
    }
    checkpoints.write_config(
        directory, "Qwen3_5Config", "Qwen3_5ForConditionalGeneration", **changes
    )
    words = [str(directory), "--attention-backend", "dca", "--skip-tokenizer-init"]
    words += ["--dtype", "bfloat16", "--block-size", "16"]
    words += ["--additional-config", json.dumps({"dca": SIZES})]
    message = ""
    try:
        served(words).create_engine_config()
    except NotImplementedError as refusal:
        message = str(refusal)
    assert "image and video inputs with M-RoPE" in message
    # What it names works, as it is written there.
    named = re.findall(r"--language-model-only|--limit-mm-per-prompt '[^']*'", message)
    assert len(named) == 2
    for flag in named:
        config = served([*words, *shlex.split(flag)]).create_engine_config()
        limits = config.model_config.multimodal_config
        assert limits.get_limit_per_prompt("image") == 0
        assert config.additional_config["dca"]["chunk_size"] == 96


@pytest.mark.each_minor
def test_images_as_embeddings_are_refused(tmp_path: Path, children: Children) -> None:
    children.run("vision", _embeddings_are_refused, tmp_path)


def _embeddings_are_refused(directory: Path) -> None:
    """vLLM's limits are not for them, and a receiver of keys takes them unasked."""
    rope = {**INTERLEAVED, "rope_type": "default"}
    architecture = "Qwen3VLForConditionalGeneration"
    checkpoints.write_config(directory, "Qwen3VLConfig", architecture, rope_parameters=rope)
    words = [str(directory), "--attention-backend", "dca", "--skip-tokenizer-init"]
    words += ["--block-size", "16", "--additional-config", json.dumps({"dca": SIZES})]
    sender = {"ec_connector": "ECExampleConnector", "ec_role": "ec_consumer"}
    asked = (["--enable-mm-embeds"], ["--ec-transfer-config", json.dumps(sender)])
    for flag in asked:
        message = rf"embeddings with M-RoPE \(text works: remove {flag[0]}\)"
        with pytest.raises(NotImplementedError, match=message):
            served([*words, "--language-model-only", *flag]).create_engine_config()
    store = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
    words += ["--kv-transfer-config", json.dumps(store)]
    none = json.dumps({"image": 0, "video": 0})
    for text_only in (["--language-model-only"], ["--limit-mm-per-prompt", none]):
        config = served([*words, *text_only]).create_engine_config()
        multimodal = config.model_config.multimodal_config
        assert not multimodal.enable_mm_embeds
        assert not multimodal.allow_missing_mm_embeddings
        assert not config.model_config.supports_multimodal_inputs


@pytest.mark.usefixtures("vision_for_children")
def test_a_request_with_an_image_gets_a_400_and_the_server_lives_on(
    tmp_path: Path, children: Children
) -> None:
    model = tmp_path / "model"
    children.run("vision", _write_a_model_that_chats, model)
    options = ["--dtype", "float32", "--enforce-eager"]
    options += ["--limit-mm-per-prompt", json.dumps({"image": 0, "video": 0})]
    # vLLM lets those that receive keys take embeddings, as if --enable-mm-embeds were given.
    store = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
    store["kv_connector_extra_config"] = {"shared_storage_path": str(tmp_path / "store")}
    options += ["--kv-transfer-config", json.dumps(store), "--mm-processor-cache-type", "shm"]
    options += ["--max-model-len", "1024", "--block-size", "16"]
    options += ["--num-gpu-blocks-override", "200"]
    options += ["--additional-config", json.dumps({"dca": SIZES})]
    server = Server(tmp_path / "log", model, *options)
    prompt = {"prompt": checkpoints.tokens(300), "max_tokens": 5, "logprobs": 0}
    try:
        server.wait()
        before = server.complete(**prompt)[1]["choices"][0]
        text = {"type": "text", "text": "What is this?"}
        image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PIXEL}"}}
        embedded = {"type": "image_embeds", "image_embeds": None, "uuid": "of another server"}
        for content, refusal in (
            ([text, image], "At most 0 image(s)"),
            ([text, embedded], "You must set `--enable-mm-embeds`"),
            ([text], None),
        ):
            status, answer = server.chat([{"role": "user", "content": content}], max_tokens=2)
            assert status == (200 if refusal is None else 400), answer
            if refusal is not None:
                assert refusal in answer["error"]["message"]
        [said] = re.findall("DCA: vLLM accepts embeddings.*", server.log.read_text())
        assert "where ExampleConnector receives keys" in said
        assert server.complete(**prompt)[1]["choices"][0] == before
    finally:
        server.stop()


def _write_a_model_that_chats(directory: Path) -> None:
    rope = {**INTERLEAVED, "rope_type": "default"}
    checkpoints.write(directory, "Qwen3VLConfig", rope_parameters=rope)
    checkpoints.write_tokenizer(directory)
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    (directory / "chat_template.jinja").write_text(template)
