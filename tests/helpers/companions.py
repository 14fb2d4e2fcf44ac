"""What is served beside a tiny checkpoint: LoRA adapters and EAGLE heads."""

from pathlib import Path

import torch

from scripts.common import adapter
from tests.helpers import checkpoints


def write_adapter(model: Path, directory: Path) -> tuple[Path, Path]:
    """A random LoRA adapter of the attention's projections; the model that has it merged in."""
    from transformers import AutoModelForCausalLM

    changes = adapter.write(model, directory / "adapter", scale=0.2)
    merged = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    weights = dict(merged.named_parameters())
    for name, change in changes.items():
        weights[name].data += change
    merged.save_pretrained(directory / "merged")
    return directory / "adapter", directory / "merged"


def write_eagle(directory: Path, method: str) -> Path:
    """A random EAGLE head: one layer over the model's hidden states and the next token."""
    import transformers
    from safetensors.torch import save_file

    config = checkpoints.config("LlamaConfig", num_hidden_layers=1)
    layer = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    size = config.hidden_size
    tensors = {
        name.removeprefix("model."): tensor.contiguous()
        for name, tensor in layer.state_dict().items()
        if "layers.0" in name and "input_layernorm" not in name
    }
    if method == "eagle":
        config.architectures = ["EagleLlamaForCausalLM"]
        tensors["fc.weight"] = torch.randn(size, 2 * size) * 0.1
        tensors["embed_tokens.weight"] = layer.state_dict()["model.embed_tokens.weight"]
    else:
        config.architectures = ["LlamaForCausalLMEagle3"]
        config.draft_vocab_size = config.vocab_size
        config.eagle_aux_hidden_state_layer_ids = [0, 1, 2]
        tensors = {
            name.replace("layers.0", "midlayer"): torch.cat([tensor, tensor], 1)
            if any(part in name for part in ("q_proj", "k_proj", "v_proj"))
            else tensor
            for name, tensor in tensors.items()
        }
        for norm in ("midlayer.input_layernorm", "midlayer.hidden_norm", "norm"):
            tensors[f"{norm}.weight"] = torch.ones(size)
        tensors["fc.weight"] = torch.randn(size, 3 * size) * 0.1
        tensors["lm_head.weight"] = layer.state_dict()["lm_head.weight"]
    config.save_pretrained(directory)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory
