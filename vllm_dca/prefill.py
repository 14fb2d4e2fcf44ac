"""Dual chunk attention over any number of new tokens: three passes and one merge.

The same for every device; what differs is the attention provider.
"""

import torch

from vllm_dca.merge import Partial, merge_partials
from vllm_dca.planning import PrefillPlan
from vllm_dca.providers import AttentionProvider
from vllm_dca.rotary import QueryRotation


def prefill_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    output: torch.Tensor,
    *,
    plan: PrefillPlan,
    rotation: QueryRotation,
    softmax_scale: float,
    provider: AttentionProvider,
) -> None:
    """Attend to the paged cache, which holds the new tokens' keys and values already.

    Args:
        query: [num_tokens, num_heads, head_size], rotated to their offsets.
        key_cache: [num_blocks, block_size, num_kv_heads, head_size], see `AttentionProvider`.
        value_cache: like key_cache.
        output: [num_tokens, num_heads, head_size], written.
        plan: made once for all layers from the batch's lengths.
        rotation: how this layer turns queries.
        softmax_scale: factor on the dot products.
        provider: computes each pass.
    """
    turns = plan.turns
    queries = list(
        rotation.turn(query, turns.tokens, turns.turn, turns.temperature).split(turns.sizes)
    )
    if turns.temperature is None:
        queries[0] = query
    partials = []
    for attention_pass, turned in zip(plan.passes, filter(len, queries), strict=True):
        part_output, lse = provider(
            turned,
            key_cache,
            value_cache,
            cu_seqlens_q=attention_pass.cu_seqlens_q,
            seqused_k=attention_pass.seqused_k,
            block_table=attention_pass.block_table,
            max_seqlen_q=attention_pass.max_seqlen_q,
            max_seqlen_k=attention_pass.max_seqlen_k,
            softmax_scale=softmax_scale,
            causal=attention_pass.causal,
        )
        partials.append(Partial(part_output, lse, attention_pass.tokens))
    output.copy_(merge_partials(partials)[0])
