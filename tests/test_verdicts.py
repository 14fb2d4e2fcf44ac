"""Every text model of vLLM's registry has a verdict, and support.py agrees with it."""

import json

import pytest

from scripts.models.recipes import architectures
from scripts.models.sweep import RECORD
from scripts.models.verdicts import PROVED, REFUSED, SAME, UNKNOWN, UNTESTABLE, verdicts
from vllm_dca.engine.support import PROVED_MODELS


@pytest.fixture(scope="module")
def record() -> dict[str, dict[str, dict[str, str]]]:
    return dict(json.loads(RECORD.read_text()))


def test_the_record_judges_every_model(record: dict[str, dict[str, dict[str, str]]]) -> None:
    assert list(record["verdicts"]) == list(architectures())
    assert record["verdicts"] == verdicts(record["found"])
    kinds = [of["verdict"] for of in record["verdicts"].values()]
    assert set(kinds) == {PROVED, SAME, REFUSED, UNTESTABLE}


def test_proved_models_are_those_of_the_record(
    record: dict[str, dict[str, dict[str, str]]],
) -> None:
    judged = record["verdicts"].values()
    proved = {of["model_type"] for of in judged if of["verdict"] == PROVED}
    assert sorted(proved) == list(PROVED_MODELS)


def test_how_what_was_found_is_judged() -> None:
    refusal = (
        "--attention-backend dca cannot serve this model: layer a.b: it has no X. DCA needs"
    )
    found = {
        "LlamaForCausalLM": {"error": 1e-5, "model_type": "llama"},
        "MambaForCausalLM": {"failed": f"NotImplementedError: {refusal} a rotary embedding"},
        "Qwen3ForCausalLM": {"failed": "UnprovedError: off by 1"},
    }
    judged = verdicts(found)
    assert judged["LlamaForCausalLM"]["verdict"] == PROVED
    assert judged["TeleChat3ForCausalLM"]["verdict"] == SAME
    assert judged["MambaForCausalLM"] == {"verdict": REFUSED, "reason": "it has no X"}
    # By the class of what is refused.
    assert judged["FalconMambaForCausalLM"]["verdict"] == REFUSED
    assert judged["Qwen3ForCausalLM"]["verdict"] == UNKNOWN
    assert judged["SolarForCausalLM"]["verdict"] == UNTESTABLE
