"""Perplexity past the trained window: DCA, its reference, and plain RoPE on the same prose.

Usage: python -m scripts.quality.twice_the_window [--model DIR] [--tokens N] [--output FILE]

Fails unless DCA's perplexity is within 2% of the reference's and plain RoPE is at least ten
times worse on the last 2,048 tokens. Takes some 15 minutes on two cores.
"""

import argparse
import gc
import os
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from scripts.common import backends, record
from scripts.common.corpus import load
from scripts.quality.methods import prepare_environment

TAIL = 2048
console = Console()


def through_engine(model: Path, prompt: list[int], backend: str) -> torch.Tensor:
    from vllm import LLM, SamplingParams

    length = (len(prompt) // 1024 + 1) * 1024
    options = {"attention_backend": backend}
    if backend != "DCA":
        # Plain RoPE past the window: a rotary table that is long enough, and nothing else.
        options["hf_overrides"] = {"max_position_embeddings": length}
    llm = LLM(str(model), dtype="float32", max_model_len=length, enforce_eager=True, **options)
    ran = llm.apply_model(backends.of_layers)
    assert all(found.startswith(backend) for [found] in ran), f"asked for {backend}, ran {ran}"
    [output] = llm.generate(
        [{"prompt_token_ids": prompt}],
        SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0),
        use_tqdm=False,
    )
    logprobs = [
        at[token].logprob
        for at, token in zip(output.prompt_logprobs[1:], prompt[1:], strict=True)
    ]
    del llm
    gc.collect()
    return torch.tensor(logprobs, dtype=torch.float64)


def by_reference(model: Path, prompt: list[int]) -> torch.Tensor:
    from transformers import AutoConfig

    from vllm_dca.method.config import resolve_settings
    from vllm_dca.reference.model import prompt_logprobs

    # The engine leaves torch in this process with one thread.
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    window = AutoConfig.from_pretrained(model).max_position_embeddings
    sizes = resolve_settings({}, None, window, block_size=128)
    return prompt_logprobs(
        model,
        prompt,
        chunk_size=sizes.chunk_size,
        local_size=sizes.local_size,
        dtype=torch.float32,
    ).double()


def perplexity(logprobs: torch.Tensor) -> float:
    return float(logprobs.mean().neg().exp())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=record.ROOT / ".cache" / "demo-model")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    prepare_environment()

    from transformers import AutoTokenizer
    from vllm.platforms import current_platform

    plain_backend = (
        "CPU_ATTN" if current_platform.is_cpu() else "TRITON_ATTN"
    )  # these take fp32
    prompt = AutoTokenizer.from_pretrained(args.model)(load())["input_ids"][: args.tokens]
    assert len(prompt) == args.tokens, f"the text has only {len(prompt)} tokens"
    runs = {
        "DCA (engine)": lambda: through_engine(args.model, prompt, "DCA"),
        "plain RoPE (engine)": lambda: through_engine(args.model, prompt, plain_backend),
        "DCA (reference)": lambda: by_reference(args.model, prompt),
    }
    table = Table("method", "all tokens", f"last {TAIL:,}", "seconds")
    results = {}
    for name, run in runs.items():
        start = time.perf_counter()
        with console.status(f"{name}: {args.tokens:,} tokens"):
            logprobs = run()
        results[name] = {
            "perplexity": perplexity(logprobs),
            "perplexity_tail": perplexity(logprobs[-TAIL:]),
            "seconds": time.perf_counter() - start,
        }
        row = results[name]
        table.add_row(
            name,
            f"{row['perplexity']:.2f}",
            f"{row['perplexity_tail']:.2f}",
            f"{row['seconds']:.0f}",
        )
        console.print(f"{name}: {row}")
    console.print(table)

    dca, plain, reference = (results[name] for name in runs)
    if args.output:
        found = {
            "text": "Jane Austen, Pride and Prejudice (scripts/common/corpus.py)",
            "tokens": args.tokens,
            "tail": TAIL,
            "results": results,
        }
        facts = record.provenance("vllm", "vllm-dca", "transformers")
        record.write(args.output, {**facts, **found})
    for key in ("perplexity", "perplexity_tail"):
        ratio = dca[key] / reference[key]
        assert abs(ratio - 1) <= 0.02, f"{key}: engine over reference is {ratio:.4f}"
    worse = plain["perplexity_tail"] / dca["perplexity_tail"]
    assert worse >= 10, f"plain RoPE is only {worse:.1f} times worse"
    console.print(f"DCA agrees with its reference; plain RoPE is {worse:.0f} times worse.")


if __name__ == "__main__":
    main()
