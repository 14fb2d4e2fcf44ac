"""Sparse prefill of a layer, settled as the model is built."""

from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index

from vllm_dca.engine.settings import settings_of
from vllm_dca.method.lines import Rule, rule_of
from vllm_dca.method.sparse import SparseSizes


def rule_of_layer(layer: Attention, vllm_config: VllmConfig) -> Rule | None:
    """How a layer's lines are selected; None where its prefill is dense, as a drafter's is."""
    settings = settings_of(vllm_config).sparse
    if settings is None:
        return None
    layers = vllm_config.model_config.hf_text_config.num_hidden_layers
    index = extract_layer_index(layer.layer_name)
    if index >= layers or layer.layer_name.startswith("draft_model."):
        return None
    rank, heads = get_tensor_model_parallel_rank(), layer.num_heads
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
