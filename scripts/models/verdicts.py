"""From what the proofs found to a verdict on each model."""

import re
from typing import Any

from scripts.models.recipes import RECIPES, UNTESTED, architectures

PROVED, SAME, REFUSED = "proved", "same class as a proved one", "refused"
UNTESTABLE, UNKNOWN = "cannot be tested here", "not looked at"
# What a start refuses with, without how it begins and ends.
_REASON = re.compile(
    r"--attention-backend dca (?:cannot serve this model: |does not support )"
    r"(?:layer (?P<at>\S+): )?"
    r"(?P<reason>.*?)(?:\. (?:DCA needs|Leave out what|Use another)|$)",
    re.DOTALL,
)


def verdicts(found: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """A verdict on each of vLLM's text models, with its reason.

    Args:
        found: what `scripts.models.proof` left, by architecture.
    """
    classes = served_by()
    judged: dict[str, dict[str, Any]] = {}
    for name in architectures():
        of = found.get(name, {})
        if "error" in of:
            judged[name] = {"verdict": PROVED, **{k: v for k, v in of.items() if k != "code"}}
        elif name in UNTESTED:
            judged[name] = {"verdict": UNTESTABLE, "reason": UNTESTED[name]}
        elif refusal := _REASON.search(of.get("failed", "")):
            judged[name] = {"verdict": REFUSED, "reason": " ".join(refusal["reason"].split())}
        elif name not in RECIPES:
            judged[name] = {"verdict": UNTESTABLE, "reason": "transformers has no code for it"}
        else:
            judged[name] = {"verdict": UNKNOWN, "reason": of.get("failed", "")}
    for name, of in judged.items():
        twins = [each for each in judged if classes[each] == classes[name] and each != name]
        for twin in twins:
            kind = judged[twin]["verdict"]
            if of["verdict"] in (UNTESTABLE, UNKNOWN) and kind in (PROVED, REFUSED):
                judged[name] = {
                    "verdict": SAME if kind == PROVED else REFUSED,
                    "reason": f"vLLM runs it by the class of {twin}",
                }
                break
    return judged


def served_by() -> dict[str, tuple[str, str]]:
    """Module and class of vLLM, by architecture."""
    from vllm.model_executor.models import registry

    known = {
        **registry._TEXT_GENERATION_MODELS,
        **registry._TRANSFORMERS_SUPPORTED_MODELS,
        **registry._MULTIMODAL_MODELS,
    }
    # Whatever transformers' code runs is a model of its own.
    return {
        name: (name, "") if known[name][0] == "transformers" else tuple(known[name])
        for name in architectures()
    }
