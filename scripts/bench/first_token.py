"""Time to the first token of long prompts, dense and by sparse prefill, through the engine.

Each method has an engine of its own, one after the other, which reads a short prompt first.
Methods are those of `scripts.quality.methods`. With --output, what is there already is kept,
so that the command can be given again with more methods, or after it was ended.
"""

import json
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from scripts.common import corpus
from scripts.quality import methods, study
from scripts.quality.study import K

METHODS = " ".join(
    (
        "dca",
        *(f"dca:sparse_coverage={share},sparse_threshold=8192" for share in (0.95, 0.85, 0.7)),
    )
)


def main(
    model: Annotated[Path, typer.Argument(help="A directory.")] = study.DEMO_MODEL,
    method: Annotated[str, typer.Option(help="Methods, spaces between.")] = METHODS,
    lengths: Annotated[str, typer.Option(help="Tokens.")] = f"{32 * K}",
    text: Annotated[str, typer.Option(help="A work, or a text file.")] = next(
        iter(corpus.WORKS)
    ),
    repeats: Annotated[int, typer.Option(min=1, help="Of each.")] = 2,
    dtype: str = "float32",
    engine_option: Annotated[str, typer.Option(help="JSON: other EngineArgs of vLLM.")] = "{}",
    output: Annotated[Path | None, typer.Option(help="A record as JSON.")] = None,
) -> None:
    methods.prepare_environment()
    ends = sorted(int(length) for length in lengths.split())
    [tokens] = study.works(text, study.tokenizer_of(model)).values()
    if len(tokens) < ends[-1]:
        raise typer.BadParameter(f"{text} has {len(tokens)} tokens")

    def measure(label: str, llm: Any) -> dict[str, Any]:
        from vllm import SamplingParams

        def read(length: int) -> float:
            llm.reset_prefix_cache()
            start = time.perf_counter()
            [output] = llm.generate(
                [{"prompt_token_ids": tokens[:length]}],
                SamplingParams(temperature=0, max_tokens=1),
                use_tqdm=False,
            )
            took = time.perf_counter() - start
            if output.num_cached_tokens:
                raise RuntimeError(f"{output.num_cached_tokens} tokens were cached")
            return round(took, 2)

        read(512)
        found: dict[str, list[float]] = {}
        for length in ends:
            found[str(length)] = [read(length) for _ in range(repeats)]
            print(f"{label}, {length} tokens: {found[str(length)]} s", flush=True)
        return {"seconds": found}

    results = study.compare(
        method,
        model,
        ends[-1] + K,
        {
            "dtype": dtype,
            "enforce_eager": True,
            "max_num_batched_tokens": 2 * K,
            **json.loads(engine_option),
        },
        {"work": text, "lengths": ends, "repeats": repeats},
        output,
        measure,
    )
    study.show(
        results, ends, lambda of, length: f"{statistics.median(of['seconds'][length]):.1f} s"
    )


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, rich_markup_mode="markdown")
    app.command(help=__doc__)(main)
    app()
