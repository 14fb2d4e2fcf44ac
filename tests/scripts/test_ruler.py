"""RULER's tasks: the text answers what is asked, and a server is what it should be."""

import http.server
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from scripts.common import record
from scripts.docs import ruler
from scripts.quality.methods import Method
from scripts.quality.ruler import sample as scoring
from scripts.quality.ruler.served import Served
from scripts.quality.ruler.tasks import QUESTION, TASKS, sample_of

NEEDLES = [name for name in TASKS if name.startswith("niah")]


def tokens(text: str) -> int:
    """A stand-in for a tokenizer."""
    return len(text) // 4


@pytest.mark.parametrize("name", TASKS)
def test_a_text_fills_its_length_and_holds_what_is_expected(name: str) -> None:
    task = TASKS[name]
    for length in (4096, 32768):
        sample, count = sample_of(task, "0 7", length, tokens)
        room = length - task.answer - QUESTION
        assert 0.95 * room <= count <= room
        for question in sample.questions:
            ending = f"{sample.prompt(question)}\n{question.start}"
            assert tokens(ending) + task.answer <= length
            assert all(each in sample.text for each in question.expected)
            # Nothing gives the answer away.
            assert not scoring.found(f"{question.text} {question.start}", question.expected)


@pytest.mark.parametrize("name", TASKS)
def test_a_seed_says_everything(name: str) -> None:
    task = TASKS[name]
    first, other = (task.sample(Random(seed), 500) for seed in "ab")
    assert task.sample(Random("a"), 500) == first
    assert other.text != first.text
    # The same is asked for at any length.
    if name != "fwe":
        assert task.sample(Random("a"), 900).questions == first.questions


@pytest.mark.parametrize("name", NEEDLES)
def test_a_needle_stands_once(name: str) -> None:
    sample = TASKS[name].sample(Random(3), 400)
    for question in sample.questions:
        assert all(sample.text.count(each) == 1 for each in question.expected)
    expected = [each for question in sample.questions for each in question.expected]
    assert len(expected) == len({*expected}) in (1, 4)


def test_kinds_that_are_alike_share_a_text() -> None:
    one, several = (
        sample_of(TASKS[name], "0 0", 8192, tokens)[0]
        for name in ("niah_multikey_1", "niah_multiquery")
    )
    assert one.text == several.text
    every = tuple(question.expected[0] for question in one.questions)
    assert several.questions[0].expected == every


def test_a_chain_leads_from_the_value_to_every_variable() -> None:
    [question] = TASKS["vt"].sample(Random(5), 300).questions
    text = TASKS["vt"].sample(Random(5), 300).text
    value = question.text.split("value ")[1].split()[0]
    giver = value
    for name in question.expected:
        assert text.count(f"VAR {name} = {giver}.") == 1
        giver = f"VAR {name}"


def test_the_expected_words_are_the_most_common_ones() -> None:
    sample = TASKS["cwe"].sample(Random(5), 200)
    listed = sample.text.rpartition("Remember those.")[2].split()[1::2]
    counts = Counter(listed)
    assert {word for word, _ in counts.most_common(10)} == {*sample.questions[0].expected}
    assert [count for _, count in counts.most_common(11)] == [30] * 10 + [3]
    sample = TASKS["fwe"].sample(Random(5), 3000)
    coded = Counter(sample.text.split("\n\n")[1].split()).most_common(4)
    assert [word for word, _ in coded] == ["...", *sample.questions[0].expected]
    assert len({count for _, count in coded}) == 4


def test_an_answer_scores_what_it_holds() -> None:
    assert scoring.found("it is AbC, then 12", ("abc", "12", "13")) == 2
    assert scoring.listed(["a", "b", "c"]) == "a, b and c"
    assert scoring.listed(["a"]) == "a"


def test_too_short_a_length_is_refused() -> None:
    with pytest.raises(ValueError, match="too few"):
        sample_of(TASKS["cwe"], "0 0", 1024, tokens)


class _Answers(http.server.BaseHTTPRequestHandler):
    metrics = ""

    def do_GET(self) -> None:
        found = self.metrics if self.path == "/metrics" else '{"data": [{"id": "a-model"}]}'
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(found.encode())

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def address() -> Iterator[str]:
    with http.server.HTTPServer(("localhost", 0), _Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://localhost:{server.server_port}"
        server.shutdown()


def test_nothing_is_reported_of_another_attention(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = Served(f"{address}/v1", chat=False)
    assert (served.url, served.model) == (address, "a-model")
    dca, plain = Method.parse("dca"), Method.parse("plain")
    gauge = 'vllm_dca:chunk_len{engine="0",model_name="a-model"} 5120.0'
    told = f"# TYPE vllm_dca:chunk_len gauge\n{gauge}\n"
    for metrics, right, wrong in ((told, dca, plain), ("vllm:x 1.0\n", plain, dca)):
        monkeypatch.setattr(_Answers, "metrics", metrics)
        assert ("5120" in served.require(right)) == right.is_dca
        with pytest.raises(RuntimeError, match="was asked for"):
            served.require(wrong)


def test_a_record_grows_and_is_of_one_run(tmp_path: Path) -> None:
    output = tmp_path / "record.json"
    record.Growing(output, {"seed": 0}).add("dca", "4096", {"found": 1})
    again = record.Growing(output, {"seed": 0})
    again.add("dca", "8192", {"found": 2})
    assert record.Growing(output, {"seed": 0}).results["dca"] == {
        "4096": {"found": 1},
        "8192": {"found": 2},
    }
    with pytest.raises(ValueError, match="another run"):
        record.Growing(output, {"seed": 1})


def test_a_table_says_how_many_and_how_sure() -> None:
    answer = {"expected": ["a", "b"], "found": 1}
    columns = {
        "run 0": {"commit": "abc"},
        "4096 vt 0": {"answers": [answer]},
        "4096 vt 1": {"answers": [{**answer, "found": 2}]},
        "8192 vt 0": {"answers": [{**answer, "found": 0}]},
    }
    assert ruler.counts(columns) == {(4096, "vt"): (3, 4), (8192, "vt"): (0, 2)}
    # Newcombe 1998, table I, method 3.
    for found, asked, low, high in ((81, 263, 0.2553, 0.3662), (0, 20, 0.0, 0.1611)):
        assert ruler.interval(found, asked) == pytest.approx((low, high), abs=5e-5)
