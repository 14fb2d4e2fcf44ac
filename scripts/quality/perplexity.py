"""Perplexity against length, by several ways to read past the trained window.

Windows of the longest length are cut from long texts, evenly spaced, and read through vLLM's
engine once by each method. A token is scored with everything before it in the window, so the
last STRIDE tokens before each length L are what a sliding evaluation with a window of L scores
in one step (Press et al. 2021; An et al. 2024 on PG19). The curve by position is kept too.

Methods are NAME or NAME:OPTION=NUMBER,...: plain, yarn, dynamic, dca, dca+yarn; see methods.py.
With --output, what is there already is kept, and methods that are not there are added.
"""

import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import track

from scripts.common import corpus
from scripts.quality import methods, study
from scripts.quality.study import K

BUCKET = 256  # tokens; what a record keeps is the mean over each
LENGTHS = (2 * K, 4 * K, 8 * K, 12 * K, 16 * K, 24 * K, 32 * K)


def windows(tokens: list[int], length: int, count: int) -> list[list[int]]:
    """`count` evenly spaced runs of a text's tokens."""
    if len(tokens) < length * count:
        raise typer.BadParameter(f"a text of {len(tokens)} tokens is short of {length * count}")
    step = len(tokens) // count
    return [tokens[at : at + length] for at in range(0, step * count, step)]


def nll(llm: Any, tokens: list[int], cached: int = 0) -> list[float]:
    """Mean negative log-likelihood of each BUCKET of tokens; the first token has none.

    Args:
        llm: the engine.
        tokens: to be scored.
        cached: so many of them, a multiple of BUCKET, are in the engine's cache; these are not
            scored.

    Raises:
        RuntimeError: another number was cached.
    """
    from vllm import SamplingParams

    parameters = SamplingParams(
        temperature=0,
        max_tokens=1,
        prompt_logprobs=0,
        skip_reading_prefix_cache=not cached,
        detokenize=False,
    )
    [output] = llm.generate([{"prompt_token_ids": tokens}], parameters, use_tqdm=False)
    if output.num_cached_tokens != cached:
        raise RuntimeError(f"{output.num_cached_tokens} tokens were cached, not {cached}")
    # The first that is computed has no score: what predicts it was not.
    first = cached + 1
    scored = [
        -at[token].logprob
        for at, token in zip(output.prompt_logprobs[first:], tokens[first:], strict=True)
    ]
    # Bucket b is of positions b * BUCKET and on; scored[0] is of position 1.
    starts = range(0, len(tokens) - cached, BUCKET)
    buckets = [scored[max(at - 1, 0) : at + BUCKET - 1] for at in starts]
    return [sum(bucket) / len(bucket) for bucket in buckets]


def perplexity(curves: list[list[float]], length: int, stride: int) -> float:
    """Of the last `stride` tokens before `length`, over all windows."""
    last = slice((length - stride) // BUCKET, length // BUCKET)
    scores = [score for curve in curves for score in curve[last]]
    return math.exp(sum(scores) / len(scores))


def main(
    model: Annotated[Path, typer.Argument(help="A directory.")] = study.DEMO_MODEL,
    method: Annotated[str, typer.Option(help="Methods, spaces between.")] = methods.DEFAULT,
    lengths: Annotated[str, typer.Option(help="Tokens.")] = " ".join(map(str, LENGTHS)),
    stride: Annotated[int, typer.Option(help="Tokens scored before each length.")] = K,
    text: Annotated[str, typer.Option(help="Works, or text files.")] = " ".join(corpus.WORKS),
    count: Annotated[int, typer.Option("--windows", help="Windows of each text.")] = 1,
    dtype: str = "float32",
    engine_option: Annotated[str, typer.Option(help="JSON: other EngineArgs of vLLM.")] = "{}",
    output: Annotated[Path | None, typer.Option(help="A record as JSON.")] = None,
) -> None:
    ends = [int(length) for length in lengths.split()]
    if any(at % BUCKET for at in [*ends, stride]):
        raise typer.BadParameter(f"lengths and stride must be multiples of {BUCKET}")
    if min(ends) < stride:
        raise typer.BadParameter(f"{min(ends)} tokens are less than the stride, {stride}")
    methods.prepare_environment()
    longest = max(ends)
    cut = {
        work: windows(tokens, longest, count)
        for work, tokens in study.works(text, study.tokenizer_of(model)).items()
    }

    def measure(label: str, llm: Any) -> dict[str, Any]:
        curves = {
            work: [nll(llm, run) for run in track(runs, f"{label}: {work}")]
            for work, runs in cut.items()
        }
        every = [curve for runs in curves.values() for curve in runs]
        found = {str(end): perplexity(every, end, stride) for end in ends}
        return {"perplexity": found, "nll": curves}

    results = study.compare(
        method,
        model,
        longest + K,  # a token is generated, too
        {"dtype": dtype, "enforce_eager": True, **json.loads(engine_option)},
        {
            "works": list(cut),
            "lengths": ends,
            "windows": count,
            "bucket": BUCKET,
            "stride": stride,
        },
        output,
        measure,
    )
    study.show(results, ends, lambda found, end: f"{found['perplexity'][end]:.2f}")


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, rich_markup_mode="markdown")
    app.command(help=__doc__)(main)
    app()
