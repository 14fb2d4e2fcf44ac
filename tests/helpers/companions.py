"""What is served beside a tiny checkpoint: LoRA adapters and EAGLE heads."""

import json
from pathlib import Path

import torch

from tests.helpers import checkpoints


def write_adapter(model: Path, directory: Path) -> tuple[Path, Path]:
    """A random LoRA adapter of the attention's projections; the model that has it merged in."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    adapter, rank = directory / "adapter", 8
    adapter.mkdir()
    names = ["q_proj", "k_proj", "v_proj", "o_proj"]
    merged = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, weight in merged.named_parameters():
        if name.split(".")[-2] not in names:
            continue
        b, a = (
            torch.randn(shape, generator=generator) * 0.2
            for shape in ((len(weight), rank), (rank, weight.shape[1]))
        )
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        tensors |= {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
        weight.data += b @ a
    save_file(tensors, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none"}
    config |= {"r": rank, "lora_alpha": rank, "target_modules": names}
    config |= {"base_model_name_or_path": str(model)}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    merged.save_pretrained(directory / "merged")
    return adapter, directory / "merged"


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
