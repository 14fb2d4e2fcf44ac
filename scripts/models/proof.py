"""One architecture past its window: vLLM with DCA against Hugging Face's code."""

import functools
import json
import multiprocessing
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from scripts.models import renamed
from tests.helpers import checkpoints
from tests.helpers.answers import generate, of_answer, of_prompt
from tests.helpers.inprocess import engine
from vllm_dca.reference.model import prompt_logprobs

ATOL = 1e-3
SIZES: dict[str, Any] = {"chunk_size": 96, "local_size": 32}
LENGTH = 300
ANSWER = 12


class UnprovedError(Exception):
    """Says what is wrong."""


def prove(directory: Path, recipe: dict[str, Any]) -> dict[str, Any]:
    """A prompt of several windows in pieces, and answers after a fresh and a cached prefix.

    Args:
        directory: where the checkpoint is written.
        recipe: `config`, a class of transformers; `changes` of its attributes; `dtype`, where
            vLLM has no fp32 kernel; `options` of the engine; `refused`, the architecture of
            what is refused by its config or as it is built, else empty; `architecture`, one of
            `renamed.RENAMED` of which the config's class makes the numbers, else empty.

    Returns:
        `error` and `tolerance`, of log-probabilities; `model_type` and `served_by`.

    Raises:
        UnprovedError: they do not agree.
        Exception: whatever a start refuses with.
    """
    dtype = recipe.get("dtype", "float32")
    options = {"additional_config": {"dca": SIZES}, "dtype": dtype, **recipe.get("options", {})}
    if recipe["refused"]:
        # Before weights are read.
        architecture = recipe["refused"]
        checkpoints.write_config(directory, recipe["config"], architecture, **recipe["changes"])
        with engine(directory, **options):
            raise UnprovedError("it starts")
    model = checkpoints.write(directory, recipe["config"], **recipe["changes"])
    served = model
    if architecture := recipe["architecture"]:
        served = renamed.write(directory.with_name("renamed"), model, architecture)
    prompt = checkpoints.tokens(LENGTH)
    # In another process: vLLM changes the classes that it takes from transformers.
    with multiprocessing.get_context("fork").Pool(1, _with_one_thread) as pool:
        reference = functools.partial(pool.apply, prompt_logprobs)
        found = _compared(served, model, prompt, dtype, options, reference)
    if architecture:
        found["model_type"] = renamed.RENAMED[architecture].model_type
    return found


def _with_one_thread() -> None:
    """After a fork OpenMP's are not there, and torch's pool is made anew by whoever is first:
    of several threads that load weights one may find none ("Invalid thread pool"). An engine
    that ran before has put a function that does nothing in the place of torch's.
    """
    torch._C.set_num_threads(1)
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"


def _compared(
    served: Path,
    model: Path,
    prompt: list[int],
    dtype: str,
    options: dict[str, Any],
    reference: Callable[[tuple[Any, ...], dict[str, Any]], torch.Tensor],
) -> dict[str, Any]:
    expected = reference((model, prompt), SIZES)
    plain = reference((model, prompt), {})
    with engine(served, **options) as llm:
        [read] = generate(llm, [prompt], prompt_logprobs=0)
        answers = [generate(llm, [prompt], max_tokens=ANSWER)[0] for _ in range(2)]
        kind = llm.llm_engine.model_config.hf_text_config.model_type
        [served_by] = llm.apply_model(lambda model: type(model).__name__)
        hits = sum(m.value for m in llm.get_metrics() if m.name == "vllm:prefix_cache_hits")
    error = (of_prompt(read).double() - expected).abs()
    distance = (plain - expected).abs()
    found = {"model_type": kind, "served_by": served_by, "prefix_hits": int(hits)}
    if dtype == "float32":
        error, distance, tolerance, signal = error.max(), distance.max(), ATOL, 100 * ATOL
    else:
        half = reference((model, prompt), {**SIZES, "dtype": getattr(torch, dtype)}).double()
        ordinary = float((half - expected).abs().mean())
        error, distance = error.mean(), distance.mean()
        tolerance, signal = 2 * ordinary, 2 * ordinary
    found |= {"error": float(error), "tolerance": tolerance, "dtype": dtype}
    if distance <= signal:
        raise UnprovedError(
            f"positions hardly matter: ordinary attention is {distance:.1e} away"
        )
    if not error <= tolerance:
        short = prompt[:100]
        plain = reference((model, short), {})
        ordinary = {**options, "additional_config": {}, "attention_backend": None}
        ordinary |= {"block_size": 32}
        with engine(served, **{**ordinary, "max_model_len": 128}) as llm:
            [read] = generate(llm, [short], prompt_logprobs=0)
        without = float((of_prompt(read).double() - plain).abs().max())
        raise UnprovedError(
            f"off by {error:.1e}, where {tolerance:.1e} is allowed; vLLM without DCA is off by "
            f"{without:.1e} on 100 tokens"
        )
    if options.get("enable_prefix_caching", True) and not hits:
        raise UnprovedError("no prefix was cached")
    (tokens, logprobs), (again, logprobs_again) = map(of_answer, answers)
    # In half precision the second answer may be another.
    if dtype == "float32" and tokens != again:
        raise UnprovedError("another answer after a cached prefix")
    errors = [
        (each.double() - reference((model, prompt + words), SIZES)[-ANSWER:]).abs()
        for words, each in ((tokens, logprobs), (again, logprobs_again))
    ]
    worst = max(float(each.max() if dtype == "float32" else each.mean()) for each in errors)
    if not worst <= tolerance:
        raise UnprovedError(f"answers are off by {worst:.1e}")
    return found


def main(directory: str, recipe: dict[str, Any]) -> None:
    """Prove it, and leave what was found, or the error, in directory/found.json."""
    from vllm.model_executor.models import registry

    # A process for it alone is here already.
    registry._run_in_subprocess = lambda inspect: inspect()
    path = Path(directory)
    try:
        found = prove(path / "model", recipe)
    except BaseException as error:
        (path / "traceback").write_text(traceback.format_exc())
        found = {"failed": f"{type(error).__name__}: {error}"}
    (path / "found.json").write_text(json.dumps(found))
    os._exit(0)  # A start that failed may have left threads that nothing ends.
