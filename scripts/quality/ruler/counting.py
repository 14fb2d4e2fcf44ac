"""Common words and frequent words: what a long list has more often than the rest."""

from dataclasses import dataclass
from random import Random

from scripts.quality.ruler import words
from scripts.quality.ruler.sample import Question, Sample, listed

LETTERS = 6  # of a coded word


@dataclass(frozen=True)
class CommonWords:
    """Some words come often in a numbered list, all others seldom. An example comes first."""

    common: int = 10
    often: int = 30
    seldom: int = 3
    answer: int = 120

    def sample(self, random: Random, size: int) -> Sample:
        # The same words are common, whatever the size.
        chosen = words.different(random, 2 * self.common)
        rest = words.different(random, size + 30 + len(chosen))
        rest = [word for word in rest if word not in {*chosen}]
        few, rest = rest[:20], rest[20:][:size]
        shown = self._list(random, chosen[self.common :], 5, few, 1)
        asked = self._list(random, chosen[: self.common], self.often, rest, self.seldom)
        [example] = shown.questions
        answered = f"{shown.prompt(example)}\n{example.start} {listed(example.expected)}."
        return Sample(f"{answered}\n\n{asked.text}", asked.questions)

    def _list(
        self, random: Random, common: list[str], often: int, rest: list[str], seldom: int
    ) -> Sample:
        every = common * often + rest * seldom
        random.shuffle(every)
        numbered = " ".join(f"{number}. {word}" for number, word in enumerate(every, 1))
        question = Question(
            f"Which {self.common} words are the most common ones in the list above?",
            f"The {self.common} words that the list above has most often are",
            tuple(common),
        )
        task = "The numbered list below has some words more often than others. Remember those."
        return Sample(f"{task}\n\n{numbered}", (question,))


@dataclass(frozen=True)
class FrequentWords:
    """Made-up words, the k-th one k**-alpha times as often as the first, which are dots."""

    asked: int = 3
    alpha: float = 2.0
    answer: int = 50

    def sample(self, random: Random, size: int) -> Sample:
        """Of `size` words."""
        shares = [rank**-self.alpha for rank in range(1, max(size // 20, 10))]
        coded = words.letters(random, len(shares) - 1, LETTERS, words.LOWER)
        every = [
            word
            for word, share in zip(["...", *coded], shares, strict=True)
            for _ in range(max(round(size * share / sum(shares)), 1))
        ]
        random.shuffle(every)
        question = Question(
            f"Leaving out the dots, which {self.asked} words does the text have most often?",
            f"Leaving out the dots, the {self.asked} most frequent words of the text above are",
            tuple(coded[: self.asked]),
        )
        task = "The text below is of coded words. Count how often each one comes."
        return Sample(f"{task}\n\n{' '.join(every)}", (question,))
