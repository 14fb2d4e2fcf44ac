"""Paged decode on the CPU: one new token a request, one query a region.

The chunk length is a multiple of the page size, so a page lies in one region, and a batch's
pages, whosever they are, go through one matrix product with the query of their region.
"""

import torch

from vllm_dca.geometry import ChunkGeometry
from vllm_dca.rotary import QueryRotation

# Keys and values gathered at a time, in elements: bounds the memory that a step takes,
# however long the contexts.
WORKSPACE_ELEMENTS = 1 << 22


class DecodePlan:
    """What all layers share: the pages of the batch, one after the other, and their queries.

    Attributes:
        pages: [num_pages] page numbers, request after request.
        rows: [num_pages] whose they are.
        copies: [num_pages] which of the 3 * num_requests turned queries reads them.
        unused: [num_pages] slots at a page's end that hold nothing yet.
        tokens, turn, temperature: the turned queries, see `QueryRotation.turn`.
    """

    def __init__(
        self,
        seq_lens: torch.Tensor,
        block_table: torch.Tensor,
        block_size: int,
        geometry: ChunkGeometry,
        original_max_position_embeddings: int | None = None,
    ) -> None:
        """Plan a step.

        Args:
            seq_lens: [num_requests], tokens of each request, the new one included.
            block_table: [num_requests, max_blocks] int32.
            block_size: tokens a page; divides the chunk length.
            geometry: the chunk sizes.
            original_max_position_embeddings: switches the temperature on.
        """
        seq_lens = seq_lens.long()
        num_requests = len(seq_lens)
        chunk = (seq_lens - 1) // geometry.chunk_len
        offset = (seq_lens - 1) % geometry.chunk_len

        used = -(-seq_lens // block_size)
        self.rows = torch.arange(num_requests).repeat_interleave(used)
        index = torch.arange(len(self.rows)) - (used.cumsum(0) - used)[self.rows]
        self.pages = block_table[self.rows, index].long()
        self.unused = ((index + 1) * block_size - seq_lens[self.rows]).clamp(min=0)
        page_chunk = index * block_size // geometry.chunk_len
        region = (chunk[self.rows] - page_chunk).clamp(max=2)
        self.copies = region * num_requests + self.rows

        self.tokens = torch.arange(num_requests).repeat(3)
        succ = (offset + geometry.chunk_len).clamp(max=geometry.chunk_size) - offset
        self.turn = torch.cat(
            [torch.zeros_like(offset), succ, geometry.inter_position - offset]
        )
        self.temperature = None
        if original_max_position_embeddings is not None:
            growth = (seq_lens / original_max_position_embeddings).log()
            self.temperature = ((0.1 * growth + 1).clamp(min=1) ** 2).repeat(3).float()


def decode_attention(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    output: torch.Tensor,
    *,
    plan: DecodePlan,
    rotation: QueryRotation,
    softmax_scale: float,
) -> None:
    """Attend from each request's last token to all of its tokens.

    Args:
        query: [num_requests, num_heads, head_size], rotated to their offsets.
        kv_cache: [num_blocks, num_kv_heads, block_size, 2 * head_size].
        output: [num_requests, num_heads, head_size], written.
        plan: made once for all layers from the batch's lengths.
        rotation: how this layer turns queries.
        softmax_scale: factor on the dot products.
    """
    num_requests, num_heads, head_size = query.shape
    _, num_kv_heads, block_size, _ = kv_cache.shape
    heads = (num_kv_heads, num_heads // num_kv_heads)
    turned = rotation.turn(query.float(), plan.tokens, plan.turn, plan.temperature)
    turned = (turned * softmax_scale).unflatten(1, heads)  # [3 * requests, kv, group, size]

    # Online softmax over workspaces of pages, in fp32.
    best = torch.full((num_requests, *heads), -torch.inf)
    total = torch.zeros(num_requests, *heads)
    acc = torch.zeros(num_requests, *heads, head_size)
    slot = torch.arange(block_size)
    step = max(1, WORKSPACE_ELEMENTS // (num_kv_heads * block_size * 2 * head_size))
    for start in range(0, len(plan.pages), step):
        part = slice(start, start + step)
        rows, unused = plan.rows[part], plan.unused[part]
        # [pages, kv, block, size]
        key, value = kv_cache[plan.pages[part]].float().chunk(2, dim=-1)
        scores = turned[plan.copies[part]] @ key.transpose(-1, -2)
        partly = unused.nonzero().squeeze(-1)
        empty = slot >= block_size - unused[partly, None]  # [partly, block]
        # Unwritten slots may hold anything, NaN included, which 0 * NaN would spread.
        scores[partly] = scores[partly].masked_fill(empty[:, None, None], -torch.inf)
        value[partly] = value[partly].masked_fill(empty[:, None, :, None], 0.0)

        before = best
        page_best = scores.amax(-1)
        best = before.scatter_reduce(
            0, rows[:, None, None].expand_as(page_best), page_best, "amax"
        )
        weights = (scores - best[rows][..., None]).exp_()
        fade = (before - best).nan_to_num(nan=0.0).exp()  # -inf - -inf: nothing seen yet
        total = (total * fade).index_add_(0, rows, weights.sum(-1))
        acc = (acc * fade[..., None]).index_add_(0, rows, weights @ value)
    output.copy_((acc / total[..., None]).flatten(1, 2))
