"""A whole model by the reference: the Hugging Face model with its attention replaced.

Norms, projections and rotary frequencies stay Hugging Face's own; queries and keys reach the
reference unrotated. Needs transformers, and nothing of vLLM.
"""

import importlib
from pathlib import Path
from typing import Any

import torch

from vllm_dca.reference.attention import dual_chunk_attention


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
    logits, _ = forward(
        model_dir,
        tokens,
        chunk_size=chunk_size,
        local_size=local_size,
        original_max_position_embeddings=original_max_position_embeddings,
        dtype=dtype,
    )
    predicted = torch.tensor(tokens[1:])[:, None]
    return logits[:-1].log_softmax(-1).gather(1, predicted)[:, 0]


def forward(
    model_dir: str | Path,
    tokens: list[int],
    *,
    chunk_size: int | None = None,
    local_size: int | None = None,
    original_max_position_embeddings: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The model's forward pass; arguments as of `prompt_logprobs`.

    Returns:
        logits [len(tokens), vocab_size] and last hidden states [len(tokens), hidden_size],
        both in `dtype`.
    """
    from transformers import AttentionInterface, AutoModelForCausalLM

    if chunk_size is None or local_size is None:
        # Every query in its first chunk: the table's first line only.
        chunk_size, local_size = 2 * len(tokens), len(tokens)
    rotary_calls: list[tuple[Any, ...]] = []

    def attention(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float,
        sliding_window: int | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        rotary_call = rotary_calls.pop() if rotary_calls else None
        if sliding_window is not None and rotary_call is not None:
            # Not DCA's: Hugging Face's own rotation, and a window.
            query, key = rotate_there(*rotary_call)
            query, key, value = (t[0].to(dtype) for t in (query, key, value))
            return sliding_attention(query, key, value, scaling, sliding_window)[None], None
        # Without rotary positions every distance is the same: DCA is ordinary attention.
        inv_freq, mscale = torch.zeros(1), 1.0
        if rotary_call is not None:
            inv_freq, mscale = _frequencies(model.model.rotary_emb, module)
        # What is not rotated keeps its length.
        length = torch.ones(query.shape[-1], dtype=dtype)
        length[: 2 * len(inv_freq)] = mscale
        output = dual_chunk_attention(
            *(t[0].transpose(0, 1) for t in (query * length, key * length, value)),
            chunk_size=chunk_size,
            local_size=local_size,
            inv_freq=inv_freq,
            is_neox=is_neox,
            scale=scaling,
            original_max_position_embeddings=original_max_position_embeddings,
            dtype=dtype,
        )
        return output[None], None

    def remember(query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        rotary_calls.append((query, key, *args))
        return query, key

    AttentionInterface.register("dca_reference", attention)
    model = AutoModelForCausalLM.from_pretrained(
        model_dir,
        dtype=dtype,
        attn_implementation="dca_reference",
        experts_implementation="eager",  # the default has no fp64
    ).eval()
    modeling: Any = importlib.import_module(type(model).__module__)
    rotate_there = modeling.apply_rotary_pos_emb
    # Which entries make a pair: asked of the model's own code.
    is_neox = modeling.rotate_half(torch.arange(4.0)).tolist() == [-2.0, -3.0, 0.0, 1.0]
    modeling.apply_rotary_pos_emb = remember
    try:
        with torch.inference_mode():
            output = model(torch.tensor([tokens]), use_cache=False, output_hidden_states=True)
    finally:
        modeling.apply_rotary_pos_emb = rotate_there
    return output.logits[0], output.hidden_states[-1][0]


def _frequencies(rotary: Any, module: torch.nn.Module) -> tuple[torch.Tensor, float]:
    """Radians a position, and the length of the rotary table; some have them per layer type."""
    prefix = f"{getattr(module, 'layer_type', None)}_"
    if not hasattr(rotary, f"{prefix}inv_freq"):
        prefix = ""
    # Dynamic NTK changes the other one with the length, which no distance of DCA has.
    inv_freq = getattr(rotary, f"{prefix}original_inv_freq")
    return inv_freq, getattr(rotary, f"{prefix}attention_scaling", 1.0)


def sliding_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, window: int
) -> torch.Tensor:
    """Ordinary causal attention to the last `window` tokens, the query's own included.

    Args:
        query: [num_heads, num_tokens, head_size], rotated.
        key: [num_kv_heads, num_tokens, head_size], rotated.
        value: like key.
        scale: factor on the dot products.
        window: in tokens.

    Returns:
        [num_tokens, num_heads, head_size].
    """
    group = len(query) // len(key)
    key, value = key.repeat_interleave(group, 0), value.repeat_interleave(group, 0)
    distance = torch.arange(query.shape[1])[:, None] - torch.arange(key.shape[1])
    hidden = (distance < 0) | (distance >= window)
    scores = (query @ key.transpose(1, 2) * scale).masked_fill(hidden, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(0, 1)
