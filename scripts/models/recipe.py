"""What a recipe is, and what several have in common."""

from typing import Any

from tests.helpers.checkpoints import MOE


def of(
    config: str,
    dtype: str = "float32",
    options: dict[str, Any] | None = None,
    refused: str = "",
    architecture: str = "",
    **changes: Any,
) -> dict[str, Any]:
    """A recipe as `scripts.models.proof.prove` takes it."""
    return {
        "config": config,
        "dtype": dtype,
        "options": options or {},
        "refused": refused,
        "architecture": architecture,
        "changes": changes,
    }


def refused(
    architecture: str, config: str, options: dict[str, Any] | None = None, **changes: Any
) -> dict[str, Any]:
    """Of a model that no start gets past."""
    return of(config, options=options, refused=architecture, **changes)


# Full layers between layers with a window of less than a chunk.
HYBRID = {
    "num_hidden_layers": 3,
    "sliding_window": 40,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
# vLLM's kernel for windows on a CPU wants heads of 32.
WIDE = {**HYBRID, "head_dim": 32}
FEW = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "head_dim": 64,
    "initializer_range": 0.1,
}
# vLLM's Mamba-2 on a CPU keeps no state in the middle of a prompt.
UNCACHED = {"enable_prefix_caching": False}
HYBRID_PAGES = {"block_size": 32, "num_gpu_blocks_override": 300}
EXPERTS = {**MOE, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_token": 2}
NO_PAGES: dict[str, Any] = {}  # Pages of linear-attention layers are of a size of their own.

FULL_MROPE = {
    "rope_type": "default",
    "rope_theta": 1e4,
    "partial_rotary_factor": 1.0,
    "mrope_section": [12, 10, 10],
    "mrope_interleaved": True,
}
TEXT_ONLY = {"language_model_only": True}
