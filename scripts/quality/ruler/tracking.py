"""Variable tracking: a value goes from variable to variable, all over the text."""

from dataclasses import dataclass
from random import Random

from scripts.quality.ruler import words
from scripts.quality.ruler.needles import hide, noise
from scripts.quality.ruler.sample import Question, Sample, listed

TASK = "The text below assigns values to variables, here and there. Follow them."
LETTERS = 5  # of a variable's name
EXAMPLE = 10  # sentences


@dataclass(frozen=True)
class Tracking:
    """One chain; `hops` more variables get the first one's value. An example comes first."""

    hops: int = 4
    answer: int = 30

    def sample(self, random: Random, size: int) -> Sample:
        shown, asked = self._chain(random, EXAMPLE), self._chain(random, size)
        [example] = shown.questions
        answered = f"{shown.prompt(example)}\n{example.start} {listed(example.expected)}."
        return Sample(f"{answered}\n\n{asked.text}", asked.questions)

    def _chain(self, random: Random, size: int) -> Sample:
        names = words.letters(random, self.hops + 1, LETTERS, words.UPPER)
        value = str(random.randrange(10000, 100000))
        givers = [value, *(f"VAR {name}" for name in names)]
        steps = [f"VAR {to} = {by}." for to, by in zip(names, givers, strict=False)]
        text = hide(random, noise(random, size), steps, in_order=True)
        start = f"By the assignments above, the {len(names)} variables of value {value} are"
        question = Question(
            f"Which variables have the value {value} in the end?", start, tuple(names)
        )
        return Sample(f"{TASK}\n\n{text}", (question,))
