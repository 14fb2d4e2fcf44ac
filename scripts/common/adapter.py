"""A random LoRA adapter for a checkpoint, where any will do."""

import json
from pathlib import Path

import torch

RANK = 8
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj"]


def write(model: Path, directory: Path, scale: float) -> dict[str, torch.Tensor]:
    """Adapt the attention's projections; returns what is added to each weight, by its name.

    Args:
        model: a folder with safetensors.
        directory: where the adapter goes; it may not exist yet.
        scale: standard deviation of the two factors' entries.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    tensors, changes = {}, {}
    for path in sorted(model.glob("*.safetensors")):
        with safe_open(path, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118 (it is no dictionary)
                if name.split(".")[-2] not in PROJECTIONS or not name.endswith(".weight"):
                    continue
                rows, columns = weights.get_slice(name).get_shape()
                b, a = (
                    torch.randn(shape, generator=generator) * scale
                    for shape in ((rows, RANK), (RANK, columns))
                )
                stem = f"base_model.model.{name.removesuffix('.weight')}"
                tensors |= {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
                changes[name] = b @ a
    directory.mkdir(parents=True)
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none"}
    config |= {"r": RANK, "lora_alpha": RANK, "target_modules": PROJECTIONS}
    config |= {"base_model_name_or_path": str(model)}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return changes
