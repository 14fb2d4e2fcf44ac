"""What `scripts.quality.windows` rests on: a text that is read in pieces, and its sums."""

import math
from pathlib import Path
from typing import Any

import pytest

from scripts.quality import retrieval, windows
from scripts.quality.perplexity import BUCKET, nll
from tests.helpers import checkpoints
from tests.helpers.inprocess import engine


def tokenizer(text: str, **_: Any) -> dict[str, list[int]]:
    return {"input_ids": [ord(letter) for letter in text]}


def test_a_text_in_pieces_is_the_text(tmp_path: Path) -> None:
    model = checkpoints.write(tmp_path, "LlamaConfig")
    ends = [2 * BUCKET, 4 * BUCKET]
    haystack = retrieval.haystack(checkpoints.tokens(ends[-1]), tokenizer, ends[-1], 512, 0)
    sizes = {"chunk_size": 96, "local_size": 16}
    with engine(model, additional_config={"dca": sizes}, max_model_len=2048) as llm:
        found = windows.read(llm, tokenizer, haystack, ends, "")
        whole = nll(llm, haystack[0])
    assert len(found["nll"]) == len(whole) == ends[-1] // BUCKET
    # The third bucket begins a piece: its first token has no score.
    for bucket in (0, 1, 3):
        assert found["nll"][bucket] == pytest.approx(whole[bucket], abs=1e-4)
    assert abs(found["nll"][2] - whole[2]) < 2 * max(whole) / BUCKET
    needles = [needle.position for needle in haystack[1]]
    assert [(answer["length"], answer["position"]) for answer in found["answers"]] == [
        (ends[0], needles[0]),
        (ends[1], needles[0]),
        (ends[1], needles[1]),
    ]


def test_what_a_length_says_is_of_the_tokens_since_the_last() -> None:
    def text(*right: bool) -> dict[str, Any]:
        ends = (BUCKET, 3 * BUCKET, 3 * BUCKET)
        answers = [{"length": e, "right": r} for e, r in zip(ends, right, strict=True)]
        return {"nll": [1.0, 2.0, 4.0], "answers": answers}

    found = windows.by_length(
        [text(True, False, True), text(False, False, True)], [BUCKET, 3 * BUCKET]
    )
    assert found == {
        BUCKET: (pytest.approx(math.e), 1, 2),
        3 * BUCKET: (pytest.approx(math.exp(3)), 2, 4),
    }
