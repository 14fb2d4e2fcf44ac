"""How much is asked of a server, and the questions whose answers are known."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

SERVED = "soaked"
ADAPTER = "soaked-adapter"
ANSWER = 16  # tokens of an answer that is checked


@dataclass(frozen=True)
class Round:
    """A run of `vllm bench serve`: random prompts of input_len * (1 +- spread) tokens."""

    concurrency: int
    requests: int
    input_len: int
    spread: float
    output_len: int


@dataclass(frozen=True)
class Size:
    max_model_len: int
    checked: tuple[int, ...]  # lengths of the texts
    rounds: tuple[Round, ...]  # a pass
    passes: int  # of each server
    pause: float  # seconds between two hostile requests
    abandoned: int  # tokens of a prompt whose client leaves before its answer
    additional_config: str = "{}"


# Hours on two cores: texts past the demo model's window, derived chunks.
FULL = Size(
    max_model_len=16384,
    checked=(50, 300, 900, 2000, 9000),
    rounds=(
        Round(2, 2, 6500, 0.35, 32),
        Round(4, 12, 400, 0.9, 32),
        Round(16, 32, 400, 0.9, 32),
    ),
    passes=8,
    pause=3,
    abandoned=2000,
)
# For one core that others use too. Small chunks put borders into shorter texts, and there are
# two rounds a pass, since each starts `vllm bench serve` anew.
SMALL = Size(
    max_model_len=4096,
    checked=(50, 1700, 300, 400),
    rounds=(Round(1, 1, 1700, 0.1, 16), Round(16, 120, 20, 0.9, 4)),
    passes=6,
    pause=1,
    abandoned=150,
    additional_config='{"dca": {"chunk_size": 1024, "local_size": 256}}',
)


@dataclass(frozen=True)
class Question:
    """A prompt whose answer is known: that of the server when it is alone, or, of samples, with
    the log-probabilities that their tokens have as a prompt.

    Attributes:
        kind: which feature it needs.
        text: tokens.
        options: of the request, beside those of every question.
        choices: how many answers are asked for; more than one are samples.
    """

    kind: str
    text: list[int]
    options: dict[str, Any] = field(default_factory=dict)
    choices: int = 1


# On a CPU, vLLM 0.32 hands its rejection sampler temperatures that it never wrote: with
# speculation a batch in which any request samples gets wrong tokens, greedy ones too, with any
# attention. So one server speculates, and the other samples. Samples are checked by the
# log-probabilities of a prompt, and on a CPU those end an engine that has LoRA enabled: the
# first server has the adapter.
SERVERS = {"speculating": True, "sampling": False}


def questions(
    prose: list[int], lengths: tuple[int, ...], speculating: bool
) -> Iterator[Question]:
    """Of a text of each length; one of every feature, the shorter texts taken in turn."""
    starts = itertools.accumulate(lengths, initial=0)
    texts = [prose[at : at + n] for at, n in zip(starts, lengths, strict=False)]
    for text in texts:
        yield Question("greedy", text)
    short = itertools.cycle(text for text in texts if 200 < len(text) <= 2000)
    # A text that repeats itself: what ngram speculation drafts is mostly right.
    passage = next(short)[:200]
    yield Question("copied", passage * 3 + passage[:100])
    if speculating:
        yield Question("adapter", next(short), {"model": ADAPTER})
    else:
        yield Question("samples", next(short), {"temperature": 1, "n": 3}, choices=3)
    only = {"structured_outputs": {"regex": "(war|marriage|money|love){3}"}}
    yield Question("structured", next(short), {**only, "ignore_eos": False})
