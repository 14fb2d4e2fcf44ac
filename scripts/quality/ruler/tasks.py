"""The tasks, by RULER's names, and a text of so many tokens."""

from collections.abc import Callable
from random import Random

from scripts.quality.ruler import words
from scripts.quality.ruler.counting import CommonWords, FrequentWords
from scripts.quality.ruler.needles import Needles, essay, noise
from scripts.quality.ruler.sample import Sample, Task
from scripts.quality.ruler.tracking import Tracking

# With RULER's numbers; niah_multikey_1 and niah_multiquery are questions about the same texts.
TASKS: dict[str, Task] = {
    "niah_single_1": Needles(noise),
    "niah_single_2": Needles(essay),
    "niah_single_3": Needles(essay, value=words.uuids),
    "niah_multikey_1": Needles(essay, keys=4),
    "niah_multiquery": Needles(essay, keys=4, asked=4),
    "niah_multikey_2": Needles(None),
    "niah_multikey_3": Needles(None, key=words.uuids, value=words.uuids),
    "niah_multivalue": Needles(essay, values=4),
    "vt": Tracking(),
    "cwe": CommonWords(),
    "fwe": FrequentWords(),
}
QUESTION = 192  # tokens for the question, the answer's first words and a chat template
FULL_ENOUGH = 0.98


def sample_of(
    task: Task, seed: str, length: int, tokens: Callable[[str], int]
) -> tuple[Sample, int]:
    """A sample that is as long as a length allows, and its text's tokens.

    Args:
        task: of TASKS.
        seed: one seed asks for the same at any length.
        length: tokens of the longest prompt and its answer.
        tokens: counts those of a text.

    Raises:
        ValueError: not even the shortest text fits.
    """
    room = length - task.answer - QUESTION
    fitting, low, high, size = None, 0, 0, max(room // 16, 1)
    while high != low + 1 and (fitting is None or fitting[1] < FULL_ENOUGH * room):
        sample = task.sample(Random(seed), size)
        found = tokens(sample.text)
        if found <= room:
            fitting, low = (sample, found), size
        else:
            high = size
        # A text's tokens are nearly in proportion to its size, until both sides are known.
        size = (low + high) // 2 if low and high else max(size * room // found, 1)
        if size == low:
            size += 1
    if fitting is None:
        raise ValueError(f"{length} tokens are too few for the task")
    return fitting
