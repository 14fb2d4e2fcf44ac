"""Who gets a periodic rotary table, and which tables go."""

import gc
import types
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import checkpoints
from tests.helpers.answers import generate
from tests.helpers.checkpoints import SIZES
from tests.helpers.inprocess import engine, settle

pytestmark = pytest.mark.each_minor


def test_only_the_layers_of_dca_get_a_periodic_table(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.model_executor.layers.rotary_embedding import _ROPE_DICT, RotaryEmbedding

    from vllm_dca.engine import rotary_tables

    originals: list[tuple[weakref.ref[Any], torch.Tensor]] = []
    periodic = rotary_tables.periodic

    def spy(rotary: RotaryEmbedding, *rest: Any) -> Any:
        originals.append((weakref.ref(rotary), rotary.cos_sin_cache.clone()))
        return periodic(rotary, *rest)

    def tables(model: torch.nn.Module) -> list[tuple[int, torch.Tensor, bool]]:
        modules = [layer.self_attn.rotary_emb for layer in model.model.layers]
        return [(id(m), m.cos_sin_cache, m._forward_method.__self__ is m) for m in modules]

    monkeypatch.setattr(rotary_tables, "periodic", spy)
    _ROPE_DICT.clear()
    gc.collect()
    others = [each for each in gc.get_objects() if type(each) is RotaryEmbedding]
    with engine(llama, additional_config={"dca": SIZES}) as llm:
        [found] = llm.apply_model(tables)
        [(shared, original)] = originals
        gc.collect()
        # The original has gone, and the only table is the periodic one.
        assert shared() is None
        live = [each for each in gc.get_objects() if type(each) is RotaryEmbedding]
        known = {id(each) for each in others}
        assert {id(each) for each in live} - known == {module for module, _, _ in found}
        del live
    assert original.shape[0] == checkpoints.WINDOW
    assert len(found) == 2
    assert len({module for module, _, _ in found}) == 1
    for _, table, bound_to_itself in found:
        # A copy bound to the original would silently go on using the original's table.
        assert bound_to_itself
        assert torch.equal(table, original[torch.arange(1024) % 64])


def test_a_table_of_few_rows_is_not_read_past_its_end(tmp_path: Path) -> None:
    """LongRoPE's is read by torch, which sees it."""
    scaling = checkpoints.SCALINGS["LongRoPE"]
    model = checkpoints.write(tmp_path, "LlamaConfig", rope_parameters=scaling)
    with engine(model, additional_config={"dca": SIZES}, max_model_len=2) as llm:
        [output] = generate(llm, [[5]])
    assert len(output.outputs[0].token_ids) == 1


def test_a_rotary_module_goes_when_nobody_uses_it(llama: Path) -> None:
    """Layers that keep it keep it, and a model that comes later gets one like it."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding import _ROPE_DICT, get_rope

    from vllm_dca.engine.rotary_replacements import RotaryReplacements
    from vllm_dca.engine.rotary_trace import Rotation
    from vllm_dca.engine.settings import settings_of

    config = settle(llama, additional_config={"dca": SIZES}, max_model_len=1024)
    _ROPE_DICT.clear()
    with set_current_vllm_config(config):
        rotary = get_rope(16, 128)
        model = torch.nn.ModuleList([torch.nn.Identity(), rotary])
        rotaries = RotaryReplacements(settings_of(config), 1024)
        rotaries.make_periodic("first", Rotation(rotary, [(model, "0")]), model)
        rotaries.forget_replaced(model)
        assert get_rope(16, 128) is rotary
        rotaries.make_periodic("second", Rotation(rotary, [(model, "1")]), model)
        assert model[1] is model[0]
        rotaries.forget_replaced(model)
        assert not _ROPE_DICT
        again = get_rope(16, 128)
        assert again is not rotary
        assert torch.equal(again.cos_sin_cache, rotary.cos_sin_cache)
        # One that is long enough stays where it is.
        model.append(torch.nn.Identity())
        rotaries.make_long("third", Rotation(get_rope(16, 1024), [(model, "2")]), model)
        assert model[2] is get_rope(16, 1024)
        rotaries.forget_replaced(model)
        assert len(_ROPE_DICT) == 2


def test_longrope_of_transformers_own_code_is_refused() -> None:
    """Which of its frequencies count hangs on the length of the request."""
    from vllm_dca.engine import transformers_rotary

    rotary = types.SimpleNamespace(rope_type="longrope")
    with pytest.raises(ValueError, match="is of type longrope, not default"):
        transformers_rotary.periodic(rotary, 96, 64, None)
