"""Sparse prefill of models that have Mamba beside attention, against the reference."""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from scripts.models.recipes import RECIPES
from tests.helpers import checkpoints
from tests.helpers.answers import ATOL, assert_close, generate, of_answer, of_prompt
from tests.helpers.inprocess import engine, settle
from tests.helpers.sparse_served import (
    AUTO,
    AUTO_RULE,
    LENGTH,
    PROMPT,
    SIZES,
    STEP,
    expected,
    options,
)
from vllm_dca.reference.model import prompt_logprobs
from vllm_dca.reference.sparse import Rule

# Granite's layers attend or keep a state; each of Falcon-H1's does both.
KINDS = {
    "GraniteMoeHybridForCausalLM": ["attention", "mamba", "attention"],
    "FalconH1ForCausalLM": ["hybrid", "hybrid"],
}
# By layer that attends, and head: verticals and diagonals.
BUDGETS = [[(40, 110), (90, 160)], [(130, 260), (60, 300)]]
# A request that is decoded while the prompt is read, and the prompt's steps beside it.
OTHER = checkpoints.tokens(30, 1)
ANSWER = 4
BESIDE = [STEP - len(OTHER), STEP - 1, LENGTH - 2 * STEP + len(OTHER) + 1]


class Hybrid(NamedTuple):
    """A checkpoint.

    Attributes:
        model: its folder.
        options: of its engine, beside DCA's.
        attend: by layer, whether it does.
        dense: log-probabilities of the prompt without sparse prefill.
    """

    model: Path
    options: dict[str, Any]
    attend: list[bool]
    dense: torch.Tensor

    def by_layer(self, of_attending: list[Any], otherwise: Any) -> list[Any]:
        """What attending layers have, at the places that they have in the model."""
        remaining = iter(of_attending)
        return [next(remaining) if attends else otherwise for attends in self.attend]


@pytest.fixture(scope="module", params=KINDS)
def hybrid(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Hybrid:
    recipe, kinds = RECIPES[request.param], KINDS[request.param]
    changes = {
        **recipe["changes"],
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_hidden_layers": len(kinds),
    }
    if "layer_types" in changes:
        # By default Granite's scores are so large that weights of lines tie in fp32.
        changes |= {"layer_types": kinds, "attention_multiplier": 0.2}
    directory = tmp_path_factory.mktemp("hybrid")
    model = checkpoints.write(directory, recipe["config"], **changes)
    dense = prompt_logprobs(model, PROMPT, **SIZES)
    return Hybrid(model, recipe["options"], [kind != "mamba" for kind in kinds], dense)


def by_budgets(file: Path, layers: list[Any]) -> dict[str, Any]:
    """Options with a file of these, as `vllm-dca calibrate` writes it."""
    content = [
        {str(head): ["vertical_and_slash", *pair, 1] for head, pair in enumerate(heads)}
        for heads in layers
    ]
    file.write_text(json.dumps(content))
    return options(sparse="checkpoint", sparse_budgets=str(file))


def assert_agrees(hybrid: Hybrid, rules: list[Any], given: dict[str, Any]) -> None:
    """The prompt and an answer, beside a request that is decoded, and far from dense ones."""
    with engine(hybrid.model, **hybrid.options, **given) as llm:
        [_, output] = generate(llm, [OTHER, PROMPT], max_tokens=ANSWER, prompt_logprobs=0)
    tokens, logprobs = of_answer(output)
    right = expected(hybrid.model, rules, [*PROMPT, *tokens], [*BESIDE, *[1] * ANSWER])
    assert_close(of_prompt(output), right[:-ANSWER])
    assert_close(logprobs, right[-ANSWER:])
    assert (right[:-ANSWER] - hybrid.dense).abs().max() > 100 * ATOL


def test_auto_agrees_with_the_reference(hybrid: Hybrid) -> None:
    assert_agrees(hybrid, hybrid.by_layer([AUTO_RULE] * 2, None), options(**AUTO))


def test_budgets_are_by_the_number_of_a_layer_in_the_model(
    hybrid: Hybrid, tmp_path: Path
) -> None:
    rules = [Rule(*zip(*heads, strict=True), continuous=True) for heads in BUDGETS]
    given = by_budgets(tmp_path / "budgets.json", hybrid.by_layer(BUDGETS, []))
    assert_agrees(hybrid, hybrid.by_layer(rules, None), given)


def test_every_layer_that_attends_needs_budgets(hybrid: Hybrid, tmp_path: Path) -> None:
    file = tmp_path / "budgets.json"
    whole = hybrid.by_layer(BUDGETS, [])
    config = settle(hybrid.model, **hybrid.options, **by_budgets(file, whole))
    settled = config.additional_config["dca"]["sparse"]["budgets"]
    assert [[tuple(pair) for pair in heads] for heads in settled] == whole
    for layer in range(len(whole)):
        if hybrid.attend[layer]:
            lacking = [*whole[:layer], [], *whole[layer + 1 :]]
            message = f"has None for head 0 of layer {layer}, not"
            with pytest.raises(ValueError, match=re.escape(message)):
                settle(hybrid.model, **hybrid.options, **by_budgets(file, lacking))
