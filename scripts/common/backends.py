"""Asked of an engine's workers through `LLM.apply_model`: which attention ran.

A module of its own, because vLLM passes the function on by name.
"""

import torch


def of_layers(model: torch.nn.Module) -> list[str]:
    """The backends of a worker's layers, DCA's with who computes it: "DCA (compiled)"."""
    from vllm.model_executor.layers.attention import Attention

    layers = [layer for layer in model.modules() if isinstance(layer, Attention)]
    prepared = [getattr(layer.impl, "prepared", None) for layer in layers]
    return sorted(
        {
            layer.attn_backend.get_name() + (f" ({own.device.provider})" if own else "")
            for layer, own in zip(layers, prepared, strict=True)
        }
    )
