"""Tiny models through vLLM's engine in bf16, held against the fp64 reference.

Usage: python -m scripts.hardware.parity [--dry-run] [--output FILE]

A Llama, models with windows, soft caps (Gemma 2) and sinks (gpt-oss), and Qwen3-Next, whose
queries and keys vLLM norms and rotates by a kernel of its own on a GPU. There with
torch.compile and CUDA graphs. Prompts end at, before and after chunk borders, are
prefilled in odd pieces, and their answers cross further borders. The engine may be twice as far
from fp64 as the reference run in bf16. --dry-run is the same on the CPU, eager, of fewer
prompts with shorter answers.
"""

import argparse
import gc
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from scripts.common import backends, record
from tests.helpers.checkpoints import QWEN3_NEXT, SIZES

# Heads that flash-attention takes.
SHAPE = {"hidden_size": 256, "head_dim": 64, "max_position_embeddings": 128}
WINDOWS = {
    "num_hidden_layers": 3,
    "sliding_window": 40,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("LlamaConfig", {}),
    # A cap that matters to scores as small as these, and which bf16 still resolves.
    "Gemma 2": (
        "Gemma2Config",
        {
            **WINDOWS,
            "query_pre_attn_scalar": 64,
            "attn_logit_softcapping": 10.0,
            "initializer_range": 0.1,
            "tie_word_embeddings": True,
        },
    ),
    # With wider weights bf16 alone would choose other experts.
    "gpt-oss": (
        "GptOssConfig",
        {**WINDOWS, "num_local_experts": 4, "num_experts_per_tok": 2, "initializer_range": 0.1},
    ),
    # Of fewer experts than all, bf16 alone would choose others.
    "Qwen3-Next": ("Qwen3NextConfig", {**QWEN3_NEXT, "num_experts_per_tok": 4}),
}
# As vLLM serves: compiled, in graphs of whole decodes and of other steps' pieces.
EXECUTION = {"mode": 3, "cudagraph_mode": "FULL_AND_PIECEWISE"}
LENGTHS = (63, 64, 65, 100, 190, 250)
ANSWERED = 70
# For a rehearsal.
FEWER = (65, 190)
FEW_ANSWERED = 10


def checkpoint(directory: Path, name: str) -> Path:
    """Its weights are bf16 numbers, so that every dtype has the same."""
    from transformers import AutoModelForCausalLM

    from tests.helpers import checkpoints

    config, changes = MODELS[name]
    exact = checkpoints.write(directory / "fp32", config, **{**SHAPE, **changes})
    rounded = AutoModelForCausalLM.from_pretrained(exact, dtype=torch.bfloat16)
    rounded.save_pretrained(directory / "bf16")
    return directory / "bf16"


def by_engine(
    model: Path, has_windows: bool, dry_run: bool
) -> tuple[dict[str, Any], list[Any]]:
    """What ran, and the answers with the log-probabilities of all tokens."""
    # Of a CPU's memory vLLM would take nearly all.
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from tests.helpers import checkpoints
    from tests.helpers.answers import generate
    from tests.helpers.inprocess import engine

    options = {
        "dtype": "bfloat16",
        "block_size": 32,  # what vLLM's layers with a window take on a CPU
        **({"enforce_eager": True} if dry_run else {"compilation_config": EXECUTION}),
        "max_model_len": 384,
        "max_num_batched_tokens": 117,
        "max_num_seqs": 8,
        "additional_config": {"dca": SIZES},
    }
    with engine(model, **options) as llm:
        compilation = llm.llm_engine.vllm_config.compilation_config
        ran = {
            "backends": llm.apply_model(backends.of_layers),
            "cudagraph_mode": compilation.cudagraph_mode.name,
            "compilation_mode": compilation.mode.name,
        }
        for names in ran["backends"]:
            of_dca = [name for name in names if name.startswith("DCA (")]
            assert (len(of_dca), len(names)) == (1, 1 + has_windows), names
        if not dry_run:
            check_execution(compilation)
        lengths, answered = (FEWER, FEW_ANSWERED) if dry_run else (LENGTHS, ANSWERED)
        prompts = [checkpoints.tokens(length, length) for length in lengths]
        answers = generate(llm, prompts, max_tokens=answered, prompt_logprobs=0)
    gc.collect()
    return ran, answers


def check_execution(compilation: Any) -> None:
    """vLLM gives up compiling or graphs on the way, where something cannot have them.

    Args:
        compilation: vLLM's config of it, once the engine has started.
    """
    found = {
        "mode": int(compilation.mode),
        "cudagraph_mode": compilation.cudagraph_mode.name,
    }
    assert found == EXECUTION, f"{found}, not {EXECUTION}"


def compare(model: Path, answers: list[Any]) -> dict[str, float]:
    """Distances from fp64, root mean squares over all tokens of all sequences."""
    from tests.helpers.answers import of_answer, of_prompt
    from vllm_dca.reference.model import prompt_logprobs

    found, exact, rounded, plain = [], [], [], []
    for answer in answers:
        tokens, logprobs = of_answer(answer)
        sequence = [*answer.prompt_token_ids, *tokens]
        found.append(torch.cat([of_prompt(answer), logprobs]).double())
        exact.append(prompt_logprobs(model, sequence, **SIZES))
        rounded.append(prompt_logprobs(model, sequence, **SIZES, dtype=torch.bfloat16).double())
        plain.append(prompt_logprobs(model, sequence))

    def distance(some: list[torch.Tensor]) -> float:
        return (torch.cat(some) - torch.cat(exact)).square().mean().sqrt().item()

    return {
        "engine": distance(found),
        "bf16 reference": distance(rounded),
        "without DCA": distance(plain),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="eager, and without a GPU")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    journal = record.Journal(args.output, record.provenance("transformers"))
    for name, (_, changes) in MODELS.items():
        with journal.attempt(name), tempfile.TemporaryDirectory() as directory:
            model = checkpoint(Path(directory), name)
            ran, answers = by_engine(model, "sliding_window" in changes, args.dry_run)
            distances = compare(model, answers)
            journal.add({"model": name, "ran": ran, "rms_from_fp64": distances})
            print(name, ran, distances, flush=True)
            allowed = 2 * distances["bf16 reference"]
            assert distances["engine"] <= allowed, f"{distances['engine']} > {allowed}"
            # Else this could not tell DCA from no DCA.
            assert distances["without DCA"] > allowed, distances
    journal.end()


if __name__ == "__main__":
    main()
