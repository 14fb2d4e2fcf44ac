"""Asked of an engine's workers through `LLM.apply_model`: which attention ran.

A module of its own, because vLLM passes the function on by name.
"""

import torch


def of_layers(model: torch.nn.Module) -> list[str]:
    from vllm.model_executor.layers.attention import Attention

    layers = [layer for layer in model.modules() if isinstance(layer, Attention)]
    return sorted({layer.attn_backend.get_name() for layer in layers})
