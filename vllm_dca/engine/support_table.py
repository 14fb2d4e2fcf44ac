"""The table of docs/supported.md, made from what is declared and what is refused."""

from vllm_dca.engine.refusals import REFUSALS, REFUSED_BY_VLLM, REFUSED_IN_LAYERS
from vllm_dca.engine.shims import TESTED_VLLM
from vllm_dca.engine.support import DRAFTERS, DRAFTERS_ON_THE_CPU, PROVED_MODELS, ROPE_TYPES

SUPPORTED: dict[str, tuple[str, ...]] = {
    "vLLM": tuple(f"{minor}, tested {how}" for minor, how in TESTED_VLLM.items()),
    "platform": ("CPU", "CUDA from compute capability 8.0, [not yet run](gpu.md)"),
    "models": tuple(PROVED_MODELS.values()),
    "RoPE scaling": ROPE_TYPES,
    "dtypes": ("fp32", "bf16", "fp16", "a KV cache of the model's dtype", "on CUDA also FP8"),
    "engine": (
        "chunked prefill",
        "prefix caching",
        "mixed batches",
        "preemption",
        "torch.compile and `--enforce-eager`",
        "`n` samples",
        "beam search",
        "log-probabilities of prompts and answers",
        "structured output",
        "LoRA",
        "quantised weights",
        "embeddings and pooling",
        "prompts as embeddings",
        "reloading weights",
        "KV connectors",
        "[sparse prefill](sparse.md) on the CPU",
        f"speculative decoding by {', '.join(DRAFTERS)} (on the CPU only: "
        f"{', '.join(DRAFTERS_ON_THE_CPU)})",
        "tensor and pipeline parallel",
        "data parallel for dense models",
        "Ray's executor",
    ),
    "block size": ("any that divides the chunk length (messages name those that do)",),
}


def table() -> str:
    """The support table, in Markdown."""
    refused: dict[str, list[str]] = {area: [] for area in SUPPORTED}
    for refusal in REFUSALS:
        refused[refusal.area].append(refusal.what)
    refused["models"] += REFUSED_IN_LAYERS.values()
    refused["engine"] += REFUSED_BY_VLLM
    refused["vLLM"].append("other minors")
    refused["block size"].append("on CUDA, what is no multiple of 16")
    lines = ["| | supported | refused |", "|---|---|---|"]
    for area, supported in SUPPORTED.items():
        lines.append(f"| {area} | {'; '.join(supported)} | {'; '.join(refused[area])} |")
    return "\n".join(lines) + "\n"
