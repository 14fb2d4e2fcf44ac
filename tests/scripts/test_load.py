"""The soak finds what it must find, and asks what it says that it asks."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from scripts.load.soak.__main__ import Record
from scripts.load.soak.client import request
from scripts.load.soak.plan import FULL, SERVERS, SMALL, Question, Size, questions
from scripts.load.soak.traffic import ATOL, Traffic
from scripts.load.soak.watch import Memory

EXPECTED = {"tokens": [5, 6], "text": "ab", "logprobs": [-1.0, -2.0], "margin": 0.5}


@pytest.mark.parametrize("size", [FULL, SMALL])
@pytest.mark.parametrize("speculating", SERVERS.values())
def test_it_asks_for_every_feature(size: Size, speculating: bool) -> None:
    asked = list(questions(list(range(30000)), size.checked, speculating))
    kinds = [question.kind for question in asked]
    assert kinds.count("greedy") == len(size.checked)
    of_its_own = "adapter" if speculating else "samples"
    assert set(kinds) == {"greedy", "copied", "structured", of_its_own}
    assert all(0 < len(question.text) < size.max_model_len for question in asked)
    [copied] = (question.text for question in asked if question.kind == "copied")
    assert copied[:200] == copied[200:400]


def test_nobody_samples_unasked() -> None:
    assert json.loads(request(prompt=[5]))["temperature"] == 0
    assert json.loads(request(prompt=[5], temperature=1))["temperature"] == 1


@pytest.mark.parametrize(
    ("choices", "right"),
    [
        ([{}, {}], True),
        ([{}], False),
        ([{}] * 3, False),
        ([], False),
        ([{}, {"tokens": [5, 7]}], False),
        ([{"logprobs": [-1.0, -2.0 - ATOL / 2]}, {}], True),
        ([{}, {"logprobs": [-1.0, -2.0 - 2 * ATOL]}], False),
        ([{}, {"tokens": [5], "logprobs": [-1.0]}], False),
    ],
)
def test_another_answer_is_seen(choices: list[dict[str, Any]], right: bool) -> None:
    traffic = Traffic(SMALL, client=None, vocabulary=10)  # type: ignore[arg-type]
    found = [EXPECTED | each for each in choices]
    assert traffic.is_expected([EXPECTED] * 2, found) == right


def test_memory_of_two_halves() -> None:
    memory = Memory.__new__(Memory)
    first, second = (1, 9, 3, 4), (9, 5, 8, 1, 1, 1, 20, 7)
    curve = enumerate((*first, *second))
    memory.samples = [(float(t), [100.0, float(mib)]) for t, mib in curve]
    # The first of three passes is the first half.
    memory.ends_of_passes = [4, 7, 11]
    halves = memory.of_halves()
    assert (halves["first_peak_mib"], halves["second_peak_mib"]) == (109, 120)
    assert (halves["first_settled_mib"], halves["second_settled_mib"]) == (104, 107)


def test_a_record_grows_with_each_pass(tmp_path: Path) -> None:
    traffic = Traffic(SMALL, client=None, vocabulary=10)  # type: ignore[arg-type]
    traffic.lone = [(Question("greedy", [1]), EXPECTED)]
    kept = Record(tmp_path / "record.json", {"commit": "of today"})
    for passes in (1, 2):
        traffic.counts["greedy, afresh", "right"] += 1
        kept.keep("sampling", {"seconds": 7}, traffic, passes)
        found = json.loads((tmp_path / "record.json").read_text())
        assert found["commit"] == "of today"
        of = found["servers"]["sampling"]
        assert (of["passes"], of["seconds"]) == (passes, 7)
        assert of["requests"] == {"greedy, afresh: right": passes}
    assert math.isclose(of["texts"]["closest_second_choice_alone"], 0.5)


@pytest.mark.parametrize(
    ("commit", "end", "kept"),
    [
        ("of today", {"memory": {}, "violations": []}, {"sampling"}),
        ("of today", {"memory": {}, "violations": ["no prefix was found"]}, set()),
        ("of today", {"violations": []}, set()),  # stopped in a pass
        ("another", {"memory": {}, "violations": []}, set()),
    ],
)
def test_a_server_that_came_to_a_good_end_is_asked_once(
    commit: str, end: dict[str, Any], kept: set[str], tmp_path: Path
) -> None:
    output = tmp_path / "record.json"
    output.write_text(json.dumps({"commit": commit, "servers": {"sampling": end}}))
    assert Record(output, {"commit": "of today"}).servers.keys() == kept
