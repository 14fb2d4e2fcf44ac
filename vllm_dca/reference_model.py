"""A whole model by the reference: the Hugging Face model with its attention replaced.

Norms, projections and rotary frequencies stay Hugging Face's own; queries and keys reach the
reference unrotated. Needs transformers, and nothing of vLLM.
"""

import importlib
from pathlib import Path
from typing import Any

import torch

from vllm_dca.reference import dual_chunk_attention


def prompt_logprobs(
    model_dir: str | Path,
    tokens: list[int],
    *,
    chunk_size: int | None = None,
    local_size: int | None = None,
    original_max_position_embeddings: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """Log-probability of every token but the first, given those before it.

    Args:
        model_dir: a Hugging Face checkpoint of a decoder with rotary positions.
        tokens: the sequence.
        chunk_size: c; without it, ordinary attention.
        local_size: w.
        original_max_position_embeddings: switches the temperature on.
        dtype: of the whole forward pass.

    Returns:
        [len(tokens) - 1] in `dtype`.
    """
    from transformers import AttentionInterface, AutoModelForCausalLM

    if chunk_size is None or local_size is None:
        # Every query in its first chunk: the table's first line only.
        chunk_size, local_size = 2 * len(tokens), len(tokens)

    def attention(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        rotary = model.model.rotary_emb
        inv_freq = rotary.inv_freq
        mscale = getattr(rotary, "attention_scaling", 1.0)
        output = dual_chunk_attention(
            *(t[0].transpose(0, 1) for t in (query, key, value)),
            chunk_size=chunk_size,
            local_size=local_size,
            inv_freq=inv_freq,
            scale=scaling * mscale**2,
            original_max_position_embeddings=original_max_position_embeddings,
            dtype=dtype,
        )
        return output[None], None

    AttentionInterface.register("dca_reference", attention)
    model = AutoModelForCausalLM.from_pretrained(
        model_dir,
        dtype=dtype,
        attn_implementation="dca_reference",
        experts_implementation="eager",  # the default has no fp64
    ).eval()
    modeling: Any = importlib.import_module(type(model).__module__)
    rotate_there = modeling.apply_rotary_pos_emb
    modeling.apply_rotary_pos_emb = lambda query, key, *args, **kwargs: (query, key)
    try:
        with torch.inference_mode():
            logits = model(torch.tensor([tokens]), use_cache=False).logits[0, :-1]
    finally:
        modeling.apply_rotary_pos_emb = rotate_there
    predicted = torch.tensor(tokens[1:])[:, None]
    return logits.log_softmax(-1).gather(1, predicted)[:, 0]
