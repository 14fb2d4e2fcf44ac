"""Greedy generation, and the log-probabilities that come with it."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

# What the project promises of log-probabilities in fp32.
ATOL = 1e-3


def generate(
    llm: Any, prompts: list[list[int]], max_tokens: int = 1, **params: Any
) -> list[Any]:
    """Greedy answers of a fixed length to token prompts."""
    given = [{"prompt_token_ids": prompt} for prompt in prompts]
    return _answers(llm, given, max_tokens, params)


def generate_from_embeddings(
    llm: Any, model: Path, prompt: list[int], max_tokens: int = 1
) -> Any:
    """The same, where a prompt comes as rows of the model's own table."""
    weights = load_file(model / "model.safetensors")
    rows = weights["model.embed_tokens.weight"][torch.tensor(prompt)]
    [answer] = _answers(llm, [{"prompt_embeds": rows}], max_tokens, {})
    return answer


def _answers(
    llm: Any, given: list[dict[str, Any]], max_tokens: int, params: dict[str, Any]
) -> list[Any]:
    from vllm import SamplingParams

    return llm.generate(
        given,
        SamplingParams(
            temperature=0,
            max_tokens=max_tokens,
            ignore_eos=True,
            logprobs=0,
            detokenize=False,
            **params,
        ),
        use_tqdm=False,
    )


def of_prompt(output: Any) -> torch.Tensor:
    """Log-probability of every prompt token but the first."""
    tokens = output.prompt_token_ids[1:]
    return torch.tensor(
        [at[t].logprob for at, t in zip(output.prompt_logprobs[1:], tokens, strict=True)]
    )


def of_answer(output: Any) -> tuple[list[int], torch.Tensor]:
    """Tokens of the answer and their log-probabilities."""
    answer = output.outputs[0]
    return list(answer.token_ids), torch.tensor(
        [at[t].logprob for at, t in zip(answer.logprobs, answer.token_ids, strict=True)]
    )


def assert_close(found: torch.Tensor, expected: torch.Tensor, atol: float = ATOL) -> None:
    torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=atol)


def assert_same_answer(one: Any, other: Any) -> None:
    """The same tokens, with the same log-probabilities."""
    (tokens, logprobs), (other_tokens, other_logprobs) = of_answer(one), of_answer(other)
    assert tokens == other_tokens
    assert_close(logprobs, other_logprobs)


def drafted(llm: Any) -> int:
    """Tokens that speculation proposed so far."""
    return _total(llm, "vllm:spec_decode_num_draft_tokens")


def accepted(llm: Any) -> int:
    """Drafted tokens that the model kept so far."""
    return _total(llm, "vllm:spec_decode_num_accepted_tokens")


def preemptions(llm: Any) -> int:
    """Requests that had to make room so far."""
    return _total(llm, "vllm:num_preemptions")


def _total(llm: Any, name: str) -> int:
    return sum(metric.value for metric in llm.get_metrics() if metric.name == name)
