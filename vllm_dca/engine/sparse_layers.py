"""Sparse prefill of a layer, settled as the model is built."""

from vllm.config import VllmConfig
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
)
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index

from vllm_dca.engine.drafters import is_drafters
from vllm_dca.engine.layers import refusal
from vllm_dca.engine.settings import settings_of
from vllm_dca.method.sparse_config import AUTO, MODE_KEY
from vllm_dca.method.sparse_prefill import SparseSizes
from vllm_dca.method.vertical_slash import Rule, rule_of


def rule_of_layer(layer: Attention, vllm_config: VllmConfig) -> Rule | None:
    """How a layer's lines are selected; None where its prefill is dense, as a drafter's is.

    Raises:
        NotImplementedError: there are budgets for another number of heads than the layer has,
            or none.
    """
    settings = settings_of(vllm_config).sparse
    if settings is None:
        return None
    if is_drafters(layer.layer_name, vllm_config):
        return None
    index = extract_layer_index(layer.layer_name)
    rank, heads = get_tensor_model_parallel_rank(), layer.num_heads
    on_all_ranks = heads * get_tensor_model_parallel_world_size()
    if settings.budgets is not None:
        # Zamba 2's layers are numbered by those that attend.
        with_budgets = len(settings.budgets[index]) if index < len(settings.budgets) else 0
        if with_budgets != on_all_ranks:
            raise refusal(
                layer.layer_name,
                f"it has {on_all_ranks} query heads, and by the config's layer_types and "
                f"num_attention_heads budgets of layer {index} are read for {with_budgets}",
                f'a budget for each, or "{MODE_KEY}": "{AUTO}"',
            )
    return rule_of(settings, index, slice(rank * heads, (rank + 1) * heads))


def sparse_sizes(vllm_config: VllmConfig, num_heads: int) -> SparseSizes:
    """What buffers of a layer with so many query heads, on this rank, are made for."""
    settings = settings_of(vllm_config)
    assert settings.sparse is not None
    return SparseSizes(
        num_heads,
        vllm_config.scheduler_config.max_num_batched_tokens,
        vllm_config.model_config.max_model_len,
        settings.geometry.chunk_len,
        continuous=settings.sparse.budgets is not None,
    )
