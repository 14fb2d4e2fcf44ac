"""The table of RULER's tasks, from its record."""

import math
from collections import defaultdict
from collections.abc import Iterable
from statistics import NormalDist
from typing import Any

from scripts.docs.page import load
from scripts.quality.methods import name_of


def interval(found: int, asked: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's, of a share."""
    z = NormalDist().inv_cdf((1 + level) / 2)
    share, more = found / asked, z * z / asked
    middle, half = (
        share + more / 2,
        z * math.sqrt(share * (1 - share) / asked + more / asked / 4),
    )
    return (middle - half) / (1 + more), (middle + half) / (1 + more)


def counts(columns: dict[str, Any]) -> dict[tuple[int, str], tuple[int, int]]:
    """By length and task: strings found, and asked for."""
    of: dict[tuple[int, str], list[int]] = defaultdict(lambda: [0, 0])
    for column, sample in columns.items():
        if "answers" in sample:
            length, task, _ = column.split()
            for answer in sample["answers"]:
                of[int(length), task][0] += answer["found"]
                of[int(length), task][1] += len(answer["expected"])
    return {key: (found, asked) for key, (found, asked) in of.items()}


def rows(name: str = "ruler") -> Iterable[tuple[str, ...]]:
    """The head, each task, and all of them: what was found of what was asked for."""
    results = load(name)["results"]
    by_method = {label: counts(columns) for label, columns in results.items()}
    places = sorted({(key[0], label) for label, of in by_method.items() for key in of})
    order = list(by_method)
    places.sort(key=lambda place: (place[0], order.index(place[1])))
    tasks = list(dict.fromkeys(task for of in by_method.values() for _, task in of))
    yield ("task", *(f"{length:,}: {name_of(label)}" for length, label in places))
    for task in tasks:
        cells = (by_method[label].get((length, task)) for length, label in places)
        yield (task, *(f"{cell[0]} of {cell[1]}" if cell else "" for cell in cells))
    sums = []
    for length, label in places:
        of = [cell for key, cell in by_method[label].items() if key[0] == length]
        low, high = interval(sum(cell[0] for cell in of), sum(cell[1] for cell in of))
        sums.append(f"{low:.0%} to {high:.0%}")
    yield ("all, 95% interval", *sums)
