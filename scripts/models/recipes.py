"""How each text model of vLLM's registry is built here, or why it cannot be."""

import functools

from scripts.models.decoders import DECODERS
from scripts.models.hybrids import HYBRIDS
from scripts.models.refused import REFUSED

RECIPES = {**DECODERS, **HYBRIDS, **REFUSED}

MULTIMODAL = (
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen3VLForConditionalGeneration",
    "Qwen3_5ForConditionalGeneration",
    "Qwen3_5MoeForConditionalGeneration",
)


@functools.cache
def architectures() -> tuple[str, ...]:
    """vLLM's text-generation models, those that it leaves to transformers, some multimodal."""
    from vllm.model_executor.models import registry

    multimodal = "TransformersMultiModal"
    others = registry._TRANSFORMERS_SUPPORTED_MODELS.items()
    return (
        *registry._TEXT_GENERATION_MODELS,
        *(name for name, (_, served_by) in others if not served_by.startswith(multimodal)),
        *MULTIMODAL,
    )


# Why what has a recipe, or has a name in transformers, cannot be proved.
_NO_CODE = "transformers has no code for it"
_BUILT_IN = "transformers' code for it has its attention built in"
_OFF = "vLLM and transformers disagree within the window, without DCA"
_PART = "vLLM's rotary operator on a CPU turns one head only of queries in this shape"
_LATENT = f"{_NO_CODE}; its attention is MLA, which DCA refuses"
UNTESTED = {
    "BailingMoeV2_5ForCausalLM": _LATENT,
    "BailingMoeV3ForCausalLM": _LATENT,
    "LongcatFlashNgramForCausalLM": _LATENT,
    "PanguUltraMoEForCausalLM": _LATENT,
    "SarvamMLAForCausalLM": _LATENT,
    "InklingForConditionalGeneration": (
        "no recipe for its towers; its language model, InklingForCausalLM's, is refused"
    ),
    "Lfm2ForCausalLM": _PART,
    "Lfm2MoeForCausalLM": _PART,
    "DeepseekV4ForCausalLM": "transformers' config class makes none so small",
    "KimiLinearForCausalLM": "vLLM's own checks stop its start on a CPU",
    "PhiMoEForCausalLM": "transformers' code for it does not run",
    "Qwen4ExpForCausalLM": "its config class makes none without an indexer of keys",
    "Zamba2ForCausalLM": "vLLM takes no config so small",
    "DbrxForCausalLM": "vLLM cannot load the experts that transformers saves",
    "FalconForCausalLM": _BUILT_IN,
    "GPTJForCausalLM": _BUILT_IN,
    "MiMoV2FlashForCausalLM": _OFF,
    "MiniMaxM2ForCausalLM": "vLLM's router of experts on a CPU knows softmax only",
    "OlmoHybridForCausalLM": "vLLM has no CPU kernel for its linear layers",
}
