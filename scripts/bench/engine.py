"""What DCA costs through vLLM's engine, beside vLLM's own attention with plain RoPE.

Two engines stand side by side and take turns, so that both see the same machine. For prompts
of each length: time to the first token, afresh, with the prompt cached, and with all but its
last tokens cached, and the time between tokens; then tokens a second of a batch. What is
printed first is the ratio of the medians, DCA over plain. Each prompt hides a number and asks
for it. An engine that should know it and does not ends the run (plain RoPE is not asked past
the trained window, and past KNOWN tokens neither is DCA). The record is written after each
turn.
"""

import json
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.table import Table

from scripts.common import record
from scripts.quality import methods, retrieval, study
from scripts.quality.methods import Method
from scripts.quality.study import K

DECODED = 32  # tokens after the first
NEW = 256  # tokens of the next turn of a conversation
BATCH = 8  # requests
KNOWN = 16 * K  # tokens; past it the demo model is not asked by DCA either
SECONDS = 60  # of the turns of a row, after which no more begin


class Engine:
    """One of the two, and its times in seconds."""

    def __init__(self, llm: Any, backend: str) -> None:
        self.llm, self.backend = llm, backend
        self.times: dict[str, list[float]] = {}

    def time(
        self, what: str, prompts: list[list[int]], tokens: int, salt: str, cached: bool = False
    ) -> list[str]:
        """Answers of `tokens` tokens; the seconds that they took are kept under `what`.

        Raises:
            RuntimeError: a prompt was in the cache and should not be, or the other way round.
        """
        from vllm import SamplingParams

        parameters = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        asked = [{"prompt_token_ids": prompt, "cache_salt": salt} for prompt in prompts]
        start = time.perf_counter()
        outputs = self.llm.generate(asked, parameters, use_tqdm=False)
        self.times.setdefault(what, []).append(time.perf_counter() - start)
        for prompt, output in zip(prompts, outputs, strict=True):
            least = len(prompt) // 2 if cached else 0
            if not least <= output.num_cached_tokens <= (len(prompt) if cached else 0):
                raise RuntimeError(f"{what}: {output.num_cached_tokens} tokens were cached")
        return [output.outputs[0].text for output in outputs]


def measure(
    engine: Engine, length: int, prompt: list[int], number: str | None, salt: str
) -> None:
    """One turn of an engine: a prompt afresh, again, with another end, and with an answer."""
    salt += f", {length}"  # the prompts share their first tokens
    engine.time(f"first token, {length}", [prompt], 1, salt)
    engine.time(f"first token, {length} cached", [prompt], 1, salt, cached=True)
    other = prompt[:-NEW] + prompt[:NEW]
    engine.time(f"first token, {length}, {NEW} of them new", [other], 1, salt, cached=True)
    [answer] = engine.time(f"answer, {length}", [prompt], 1 + DECODED, salt, cached=True)
    if number is not None and number not in answer:
        raise RuntimeError(f"{engine.backend}, {length} tokens: {answer!r}, not {number}")


def summary(seconds: list[float]) -> dict[str, float]:
    low, median, high = np.quantile(seconds, [0.25, 0.5, 0.75]).tolist()
    return {"low": low, "median": median, "high": high, "turns": len(seconds)}


def results_of(engines: dict[str, Engine], lengths: list[int]) -> dict[str, Any]:
    """The rows for which both engines have times, by what was timed."""
    rows = {name: dict(engine.times) for name, engine in engines.items()}
    for times in rows.values():
        for length in lengths:
            wholes = times.pop(f"answer, {length}", [])
            # A turn that was cut short has no answer.
            pairs = zip(wholes, times.get(f"first token, {length} cached", []), strict=False)
            between = [(whole - first) / DECODED for whole, first in pairs]
            if between:
                times[f"between tokens, {length}"] = between
    results = {}
    for what in rows["DCA"]:
        if what in rows["plain"]:
            found = {name: summary(times[what]) for name, times in rows.items()}
            ratio = found["DCA"]["median"] / found["plain"]["median"]
            results[what] = {"ratio": ratio, "seconds": found}
    return results


def main(
    model: Annotated[Path, typer.Argument(help="A directory.")] = study.DEMO_MODEL,
    lengths: Annotated[str, typer.Option(help="Tokens.")] = f"{2 * K} {8 * K} {16 * K}",
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    dtype: str = "auto",
    engine_option: Annotated[str, typer.Option(help="JSON: other EngineArgs of vLLM.")] = "{}",
    output: Annotated[Path | None, typer.Option(help="A record as JSON.")] = None,
) -> None:
    from transformers import AutoConfig

    methods.prepare_environment()
    tokenizer = study.tokenizer_of(model)
    [text] = study.works("pride-and-prejudice", tokenizer).values()
    window = AutoConfig.from_pretrained(model).max_position_embeddings
    ends = [int(length) for length in lengths.split()]
    prompts: dict[int, tuple[list[int], str]] = {}
    for length in ends:
        start, [needle, *_] = retrieval.haystack(text, tokenizer, length - 64, length, seed=1)
        end = tokenizer(f"\n\n{needle.question}", add_special_tokens=False)["input_ids"]
        prompts[length] = start + end, needle.number
    batch = [text[at : at + K] for at in range(0, BATCH * K, K)]
    options = {"dtype": dtype, "max_num_seqs": BATCH, **json.loads(engine_option)}
    longest = max(ends) + K
    facts = record.provenance("vllm", "vllm-dca", "transformers")

    with (
        methods.engine(model, Method.parse("dca"), longest, **options) as dca,
        methods.engine(model, Method.parse("plain"), longest, **options) as plain,
    ):
        engines = {"DCA": Engine(*dca), "plain": Engine(*plain)}
        about = {
            "model": model.name,
            "engine": options,
            "backends": {name: engine.backend for name, engine in engines.items()},
            "batch": f"{BATCH} prompts of {K} tokens, {DECODED} answered",
            "repeats": repeats,
        }

        def take(name: str, length: int | None, turn: int) -> None:
            engine = engines[name]
            if length is None:
                engine.time(f"batch of {BATCH}", batch, DECODED, f"{turn}, batch")
                return
            prompt, number = prompts[length]
            knows = length <= (max(KNOWN, window) if name == "DCA" else window)
            measure(engine, length, prompt, number if knows else None, f"{turn}")

        for length in (None, min(ends)):
            for name in engines:
                take(name, length, -1)
        for engine in engines.values():
            engine.times.clear()  # so far they warmed up
        for length in (min(ends), None, *sorted(ends)[1:]):
            began = time.perf_counter()
            for turn in range(repeats):
                if turn and time.perf_counter() - began > SECONDS:
                    break
                for name in engines:
                    take(name, length, turn)
                results = results_of(engines, ends)
                if output:
                    record.write(output, {**facts, **about, "results": results})

    table = Table("", "DCA / plain", *engines)
    for what, row in results.items():
        medians = (f"{found['median'] * 1e3:.1f} ms" for found in row["seconds"].values())
        table.add_row(what, f"{row['ratio']:.2f}", *medians)
    study.console.print(table)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, rich_markup_mode="markdown")
    app.command(help=__doc__)(main)
    app()
