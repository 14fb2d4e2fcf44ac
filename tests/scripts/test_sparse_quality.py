"""What the record of sparse prefill's quality rests on: the window, the sums, and the file."""

import functools
import itertools
import math
from pathlib import Path

import pytest
import torch

from scripts.common.record import Growing
from scripts.quality import kept
from scripts.quality.kept import FIRST, Selection, SinkAndWindow
from scripts.quality.loss import losses
from tests.helpers import checkpoints
from tests.helpers.answers import assert_close, generate, of_prompt
from tests.helpers.inprocess import engine
from vllm_dca.engine.metadata import DcaMetadataBuilder
from vllm_dca.method import vertical_slash
from vllm_dca.method.sparse_operations import SparseOperations
from vllm_dca.method.sparse_planning import Segment
from vllm_dca.reference.model import prompt_logprobs


def test_a_window_has_as_many_keys_in_the_middle_of_a_segment() -> None:
    begin, end, heads = 1000, 2000, 3
    torch.manual_seed(0)
    weights = torch.rand(heads, end), torch.rand(heads, end // 64 + 1)

    def weigh(*_: object, **__: object) -> tuple[torch.Tensor, torch.Tensor]:
        return weights

    def unused(**_: object) -> None:
        raise AssertionError

    own = SparseOperations(weigh, vertical_slash.select, unused)
    exchanged = SinkAndWindow(own).operations()
    rule = vertical_slash.Rule(None, None, 0.4, 64)
    found = exchanged.weigh(segment=Segment(0, begin, end, 0))
    window, auto = exchanged.select(*found, rule), own.select(*weights, rule)
    middle = (begin + end) // 2 // 64 * 64
    j = torch.arange(middle)

    def seen(of: vertical_slash.Lines) -> torch.Tensor:
        return of.verticals[:, :middle] | of.distances[:, middle - j]

    assert torch.equal(seen(window).sum(1), seen(auto).sum(1))
    for row in seen(window).tolist():
        assert all(row[:FIRST])
        # One run of keys that are not seen.
        assert sum(a != b for a, b in itertools.pairwise(row)) == 2
        assert row[-1]
    assert not window.distances[:, 0].any()
    for label in ("dense", "auto 0.9", "window 0.7"):
        assert Selection.parse(label).label == label
    with pytest.raises(ValueError, match="is none of"):
        Selection.parse("window")


def test_ways_are_compared_on_the_texts_that_both_read() -> None:
    def read(score: float, right: int, seconds: float, **more: float) -> dict[str, object]:
        answers = [{"right": n < right} for n in range(4)]
        times = {"attention_seconds": seconds, "seconds_below": 4, "seconds": seconds + 2}
        return {"nll": [score], "answers": answers, **times, **more}

    found = losses(
        {
            "dense": {"a": read(1.0, 3, 10.0), "b": read(3.0, 4, 30.0)},
            "auto 0.9": {"b": read(3.1, 2, 15.0, keys=0.2, recall=0.9)},
            "auto 0.8": {"c": read(3.1, 2, 15.0, keys=0.2, recall=0.9)},
        }
    )
    assert list(found) == ["dense", "auto 0.9"]
    assert found["dense"].perplexity == pytest.approx(math.exp(2))
    assert found["auto 0.9"].more == pytest.approx(math.exp(0.1) - 1)
    assert found["auto 0.9"][3:6] == (2, 4, 4)
    assert found["auto 0.9"].attention_time == 0.5
    assert (found["auto 0.9"].seconds, found["auto 0.9"].dense_seconds) == (21, 36)
    assert found["auto 0.9"].read_time == 21 / 36
    assert not losses({"auto 0.9": {"b": read(3.1, 2, 15.0, keys=0.2, recall=0.9)}})


def test_commands_may_write_one_record(tmp_path: Path) -> None:
    file = tmp_path / "record.json"
    first, second = (Growing(file, {"length": 1}) for _ in range(2))
    first.add("dense", "a", {"n": 1})
    second.add("dense", "b", {"n": 2})
    assert Growing(file, {"length": 1}).results == {"dense": {"a": {"n": 1}, "b": {"n": 2}}}
    with pytest.raises(ValueError, match="of another run"):
        Growing(file, {"length": 2})


def test_an_engine_selects_as_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each way from the same prompt; as many keys by a window as by lines, and other ones."""
    # What it is told holds for every engine of the process.
    monkeypatch.setattr(DcaMetadataBuilder, "split", DcaMetadataBuilder.split)
    model = checkpoints.write(tmp_path, "LlamaConfig")
    sparse = {"sparse": "auto", "sparse_threshold": 150, "sparse_min_keys": 64}
    options = {
        "additional_config": {"dca": {"chunk_size": 512, "local_size": 64, **sparse}},
        "max_num_batched_tokens": 512,
    }
    prompt = checkpoints.tokens(900)
    answers, found = {}, {}
    with engine(model, **options) as llm:
        for label in ("auto 0.5", "window 0.5", "auto 0.9", "dense", "auto 0.5"):
            llm.apply_model(functools.partial(kept.use, label=label))
            llm.reset_prefix_cache()
            [output] = generate(llm, [prompt], prompt_logprobs=0)
            [own] = llm.apply_model(kept.kept)
            own.pop("attention_seconds")
            if label in found:  # What came between has left nothing behind.
                assert own == found[label]
                assert torch.equal(of_prompt(output), answers[label])
            found[label], answers[label] = own, of_prompt(output)
    assert found["dense"] == {}
    expected = prompt_logprobs(model, prompt, chunk_size=512, local_size=64)
    assert_close(answers["dense"], expected)
    # The first layer's queries are the same in all ways; keys are counted in one tile.
    auto, window, most = (
        {what: of[0] for what, of in found[label]["layers"].items()}
        for label in ("auto 0.5", "window 0.5", "auto 0.9")
    )
    assert auto["keys"] == window["keys"] < most["keys"]
    assert window["recall"] < auto["recall"] < most["recall"]
    assert (answers["window 0.5"] - answers["auto 0.5"]).abs().max() > 0.1
