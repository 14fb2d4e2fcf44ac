"""A step that is not causal, as vLLM asks of some drafters."""

import types

import pytest
import torch

from vllm_dca.engine.metadata import DcaMetadataBuilder


@pytest.mark.parametrize("causal", [False, torch.tensor([True, False])], ids=["all", "some"])
def test_other_attention_than_causal_is_refused(causal: bool | torch.Tensor) -> None:
    """Before anything is planned: the builder has nothing that it would plan with."""
    builder = object.__new__(DcaMetadataBuilder)
    with pytest.raises(NotImplementedError, match="attends causally only"):
        builder.build(0, types.SimpleNamespace(causal=causal))
