"""Images whose tokens do not attend as words do are refused; M-RoPE has test_mrope.py."""

from pathlib import Path

import pytest

from tests.helpers import checkpoints
from tests.helpers.children import Children
from tests.helpers.inprocess import settle


@pytest.mark.each_minor
def test_images_attended_both_ways_are_refused(tmp_path: Path, children: Children) -> None:
    children.run("vision", _both_ways, tmp_path)


def _both_ways(directory: Path) -> None:
    """What the refusal names works, and only all of it."""
    architecture = "Gemma3ForConditionalGeneration"
    kinds = ["sliding_attention", "full_attention"]
    model = checkpoints.write_config(
        directory, "Gemma3Config", architecture, layer_types=kinds, sliding_window=32
    )
    message = r"attend to each other both ways \(text works: pass --language-model-only\)"
    with pytest.raises(NotImplementedError, match=message):
        settle(model)
    message = "--language-model-only, without --enable-mm-embeds"
    for text_only in (False, True):
        with pytest.raises(NotImplementedError, match=message):
            settle(model, language_model_only=text_only, enable_mm_embeds=True)
    config = settle(model, language_model_only=True)
    assert not config.model_config.is_mm_prefix_lm
    assert config.additional_config["dca"]["window"] == checkpoints.WINDOW
