"""The tables of docs/supported.md, made from what is declared and what is refused."""

from typing import NamedTuple

from vllm_dca.engine.refusals import (
    REFUSALS,
    REFUSED_AS_BUILT,
    REFUSED_BY_VLLM,
    REFUSED_IN_LAYERS,
)
from vllm_dca.engine.shims import TESTED_VLLM
from vllm_dca.engine.support import PROVED_MODELS, ROPE_TYPES


class Shown(NamedTuple):
    """Where a feature was seen to answer as the reference does, past the window.

    Attributes:
        cpu: with the CPU's code.
        v1: with the GPU's code in Triton's interpreter, under vLLM's Model Runner V1.
        v2: likewise, under V2, which is CUDA's default.
    """

    cpu: bool = True
    v1: bool = False
    v2: bool = True


FEATURES: dict[str, Shown] = {
    "chunked prefill": Shown(v1=True),
    "mixed batches": Shown(v1=True),
    "log-probabilities of prompts and answers": Shown(v1=True),
    "prefix caching": Shown(v1=True),
    "preemption": Shown(),
    "`--enforce-eager`": Shown(v1=True),
    "torch.compile": Shown(v2=False),
    "CUDA graphs, by a stand-in": Shown(cpu=False),
    "asynchronous scheduling": Shown(cpu=False),
    "`n` samples": Shown(),
    "beam search": Shown(v2=False),
    "structured output": Shown(),
    "LoRA": Shown(),
    "quantised weights": Shown(v2=False),
    "embeddings and pooling": Shown(),
    "prompts as embeddings": Shown(),
    "reloading weights": Shown(),
    "KV connectors": Shown(),
    "[sparse prefill](sparse.md)": Shown(v1=True),
    "speculative decoding by ngram": Shown(v1=True),
    "speculative decoding by EAGLE and EAGLE-3": Shown(),
    "speculative decoding by a draft model": Shown(v1=True),
    "speculative decoding by multi-token predictors (MTP)": Shown(v2=False),
    "speculative decoding by Medusa heads (vLLM 0.32)": Shown(v2=False),
    "sliding-window layers beside full ones": Shown(v1=True),
    "linear-attention layers beside full ones": Shown(v1=True),
    "soft caps": Shown(),
    "attention sinks": Shown(),
    "M-RoPE for text": Shown(v1=True),
    "tensor parallel": Shown(),
    "pipeline parallel": Shown(v2=False),
    "data parallel for dense models": Shown(v2=False),
    "Ray's executor": Shown(v2=False),
}
SUPPORTED: dict[str, tuple[str, ...]] = {
    "vLLM": tuple(f"{minor}, tested {how}" for minor, how in TESTED_VLLM.items()),
    "platform": ("CPU", "CUDA from compute capability 8.0, [not yet run](gpu.md)"),
    "models": (f"{len(PROVED_MODELS)} types of decoders with RoPE, [one by one](models.md)",),
    "RoPE scaling": ROPE_TYPES,
    "dtypes": ("fp32", "bf16", "fp16", "a KV cache of the model's dtype", "on CUDA also FP8"),
    "engine": tuple(feature for feature, shown in FEATURES.items() if shown.cpu),
    "block size": ("any that divides the chunk length (messages name those that do)",),
}


def table() -> str:
    """The support table, in Markdown."""
    refused: dict[str, list[str]] = {area: [] for area in SUPPORTED}
    for refusal in REFUSALS:
        refused[refusal.area].append(refusal.what)
    refused["models"] += REFUSED_IN_LAYERS.values()
    for area, several in REFUSED_AS_BUILT.items():
        refused[area] += several
    refused["engine"] += REFUSED_BY_VLLM
    refused["vLLM"].append("other minors")
    refused["block size"].append("on CUDA, sizes that are not a multiple of 16")
    lines = ["| | supported | refused |", "|---|---|---|"]
    for area, supported in SUPPORTED.items():
        lines.append(f"| {area} | {'; '.join(supported)} | {'; '.join(refused[area])} |")
    return "\n".join(lines) + "\n"


def features() -> str:
    """Where each feature was shown, in Markdown."""
    lines = [
        "| | on the CPU | GPU code, interpreted, V1 | GPU code, interpreted, V2 |",
        "|---|---|---|---|",
    ]
    for feature, shown in FEATURES.items():
        cells = ("yes" if each else "" for each in (shown.cpu, shown.v1, shown.v2))
        lines.append(f"| {feature} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
