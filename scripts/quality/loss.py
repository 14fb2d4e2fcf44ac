"""What a record of `scripts.quality.sparse` says, beside dense attention of the same texts."""

import math
from statistics import fmean
from typing import Any, NamedTuple


class Loss(NamedTuple):
    """Of one way to select keys.

    Attributes:
        texts: that were read.
        perplexity: past the threshold.
        dense_perplexity: of dense attention, on the same texts.
        found: numbers, of those that were asked for.
        dense_found: likewise.
        asked: how many.
        keys: share of the keys that was kept; None where attention was dense.
        recall: share of attention that was kept; likewise.
        attention_time: of the processor past the threshold, as a share of dense attention's.
        seconds: of a text's whole read, all that a model does, below the threshold too.
        dense_seconds: likewise.
    """

    texts: int
    perplexity: float
    dense_perplexity: float
    found: int
    dense_found: int
    asked: int
    keys: float | None
    recall: float | None
    attention_time: float
    seconds: float
    dense_seconds: float

    @property
    def more(self) -> float:
        """By which share perplexity is higher."""
        return self.perplexity / self.dense_perplexity - 1

    @property
    def read_time(self) -> float:
        """Of the whole read, as a share of the dense one's."""
        return self.seconds / self.dense_seconds


def losses(results: dict[str, dict[str, Any]]) -> dict[str, Loss]:
    """By the ways' labels; texts that were not read densely are left out."""
    found, of_dense = {}, results.get("dense", {})
    for label, of_texts in results.items():
        texts = [text for text in of_texts if text in of_dense]
        if not texts:
            continue
        own = [of_texts[text] for text in texts]
        dense = [of_dense[text] for text in texts]
        shares = {
            what: fmean([of[what] for of in own]) if what in own[0] else None
            for what in ("keys", "recall")
        }
        found[label] = Loss(
            len(texts),
            *map(perplexity, (own, dense)),
            *map(right_answers, (own, dense)),
            sum(len(of["answers"]) for of in own),
            **shares,
            attention_time=_sum(own, "attention_seconds") / _sum(dense, "attention_seconds"),
            seconds=_of_a_text(own),
            dense_seconds=_of_a_text(dense),
        )
    return found


def perplexity(of_texts: list[dict[str, Any]]) -> float:
    return math.exp(fmean([score for of in of_texts for score in of["nll"]]))


def right_answers(of_texts: list[dict[str, Any]]) -> int:
    return sum(answer["right"] for of in of_texts for answer in of["answers"])


def _of_a_text(of_texts: list[dict[str, Any]]) -> float:
    return fmean([of["seconds_below"] + of["seconds"] for of in of_texts])


def _sum(of_texts: list[dict[str, Any]], what: str) -> float:
    return sum(of[what] for of in of_texts)
