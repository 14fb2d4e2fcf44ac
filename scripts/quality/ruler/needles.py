"""Needles in a haystack: sentences that name a value, somewhere in a long text."""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from scripts.quality.ruler import words
from scripts.quality.ruler.sample import Question, Sample, listed

Names = Callable[[Random, int], list[str]]
PLACES = 40  # as many depths as a needle may stand at, from the text's start to its end

# One for all kinds, so that they may share a text.
TASK = (
    "The text below has magic codes of several things in it. Remember them: "
    "you will be asked for them afterwards."
)


def hide(random: Random, lines: list[str], needles: list[str], in_order: bool = False) -> str:
    """Put each needle at a depth of its own between the lines."""
    depths = random.sample(range(PLACES), len(needles))
    if in_order:
        depths.sort()
    placed = sorted(zip(depths, needles, strict=True), reverse=True)
    lines = list(lines)
    for depth, needle in placed:
        lines.insert(round(len(lines) * depth / (PLACES - 1)), needle)
    return " ".join(lines)


def essay(random: Random, size: int) -> list[str]:
    """Sentences of the works from anywhere on; they begin anew at their end."""
    every = words.sentences()
    start = random.randrange(len(every))
    return [every[(start + at) % len(every)] for at in range(size)]


def noise(random: Random, size: int) -> list[str]:
    return [words.NOISE[at % len(words.NOISE)] for at in range(size)]


@dataclass(frozen=True)
class Needles:
    """Single, multi-key, multi-value and multi-query.

    Attributes:
        haystack: makes `size` sentences, or None: the others are needles, too.
        keys: things that have a code in the text (besides those others).
        values: codes of each.
        asked: things that one question asks for.
        key, value: make names of things, and codes.
    """

    haystack: Callable[[Random, int], list[str]] | None
    keys: int = 1
    values: int = 1
    asked: int = 1
    key: Names = words.names
    value: Names = words.numbers
    answer: int = 128

    def sample(self, random: Random, size: int) -> Sample:
        others = 0 if self.haystack else size
        # First what is asked for: it is the same whatever the size.
        values = iter(self.value(random, self.keys * self.values))
        codes = {
            key: tuple(next(values) for _ in range(self.values))
            for key in self.key(random, self.keys)
        }
        needles = [_needle(key, value) for key, of in codes.items() for value in of]
        order = Random(random.getrandbits(64))
        if self.haystack:
            lines = self.haystack(random, size)
        else:
            pairs = zip(self.key(random, others), self.value(random, others), strict=True)
            lines = [_needle(*pair) for pair in pairs]
        text = hide(order, lines, needles)
        keys = list(codes)
        groups = [keys[at : at + self.asked] for at in range(0, self.keys, self.asked)]
        questions = (
            _question(group, tuple(value for key in group for value in codes[key]))
            for group in groups
        )
        return Sample(f"{TASK}\n\n{text}", tuple(questions))


def _needle(key: str, value: str) -> str:
    return f"The magic code of {key} is {value}."


def _question(keys: list[str], expected: tuple[str, ...]) -> Question:
    code, verb = ("codes", "are") if len(expected) > 1 else ("code", "is")
    every = "all magic codes" if len(expected) > 1 else "the magic code"
    things = listed(keys)
    return Question(
        f"By the text above, what {verb} {every} of {things}?",
        f"By the text above, the magic {code} of {things} {verb}",
        expected,
    )
