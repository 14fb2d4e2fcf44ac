"""How far from fp64 an engine in half precision may be."""

from pathlib import Path

import torch

from vllm_dca.reference.model import prompt_logprobs


def allowed(
    model: Path, prompt: list[int], dtype: torch.dtype, signal: int, **sizes: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The log-probabilities of a prompt in fp64, and by how much they may be missed on average.

    Twice what the reference itself misses them by in that dtype, because the engine rounds a
    turned query and a partial output once more. Ordinary attention is further than `signal`
    times the reference's own error away.
    """
    exact = prompt_logprobs(model, prompt, **sizes)
    half = prompt_logprobs(model, prompt, **sizes, dtype=dtype).double()
    ordinary = (half - exact).abs().mean()
    assert (prompt_logprobs(model, prompt) - exact).abs().mean() > signal * ordinary
    return exact, 2 * ordinary
