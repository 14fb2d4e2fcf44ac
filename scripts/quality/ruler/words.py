"""Names, numbers, words and sentences for the tasks, from scripts/common/corpus.py."""

import functools
import re
import string
import uuid
from random import Random

from scripts.common import corpus

# Says nothing, again and again.
NOISE = (
    "Rain falls on the roof.",
    "The road goes on.",
    "A dog barks far away.",
    "Somebody shuts a door.",
    "Then all is quiet again.",
)


@functools.cache
def sentences() -> tuple[str, ...]:
    """Of both works, in order."""
    text = " ".join(" ".join(corpus.load(work).split()) for work in corpus.WORKS)
    return tuple(re.split(r"(?<=[.!?]) +", text))


@functools.cache
def vocabulary() -> tuple[str, ...]:
    """Words of five to nine letters that the works have in lower case, several thousand."""
    seen = {word for line in sentences() for word in re.findall(r"\b[a-z]{5,9}\b", line)}
    return tuple(sorted(seen))


def names(random: Random, count: int) -> list[str]:
    """Different ones, each two words with a hyphen."""
    found: dict[str, None] = {}
    while len(found) < count:
        found["-".join(random.sample(vocabulary(), 2))] = None
    return list(found)


def numbers(random: Random, count: int) -> list[str]:
    """Different ones, of seven digits."""
    return [str(number) for number in random.sample(range(10**6, 10**7), count)]


def uuids(random: Random, count: int) -> list[str]:
    return [str(uuid.UUID(int=random.getrandbits(128), version=4)) for _ in range(count)]


def letters(random: Random, count: int, length: int, alphabet: str) -> list[str]:
    """Different strings of letters."""
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(random.choices(alphabet, k=length))] = None
    return list(found)


def different(random: Random, count: int) -> list[str]:
    """Different words; pairs, when there are not as many words."""
    if count <= len(vocabulary()):
        return random.sample(vocabulary(), count)
    return names(random, count)


UPPER, LOWER = string.ascii_uppercase, string.ascii_lowercase
