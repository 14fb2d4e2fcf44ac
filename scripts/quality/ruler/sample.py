"""A text with questions about it, and what answers score."""

from collections.abc import Iterable
from dataclasses import dataclass
from random import Random
from typing import Protocol


@dataclass(frozen=True)
class Question:
    """Asked at the text's end.

    Attributes:
        text: the question.
        start: the answer's first words; the model goes on.
        expected: strings that the answer should hold.
    """

    text: str
    start: str
    expected: tuple[str, ...]


@dataclass(frozen=True)
class Sample:
    text: str
    questions: tuple[Question, ...]

    def prompt(self, question: Question) -> str:
        """What the model reads before the answer's first words."""
        return f"{self.text}\n\n{question.text}"


class Task(Protocol):
    """A kind of text. A larger `size` is a longer text; one seed always asks for the same."""

    answer: int
    """Tokens that an answer may take."""

    def sample(self, random: Random, size: int) -> Sample: ...


def found(answer: str, expected: Iterable[str]) -> int:
    """How many of the strings an answer holds, in any case: RULER's `string_match_all`."""
    return sum(each.lower() in answer.lower() for each in expected)


def listed(names: Iterable[str]) -> str:
    """A, B and C."""
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last
