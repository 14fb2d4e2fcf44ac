"""Paged decode on the CPU: a few new tokens a request, one query a region.

The chunk length is a multiple of the page size, so a page lies in one region, and a batch's
pages, whosever they are, go through one matrix product with the query of their region.
"""

from collections.abc import Iterator

import torch

from vllm_dca.geometry import ChunkGeometry
from vllm_dca.rotary import QueryRotation, turn_queries
from vllm_dca.rows import Rows

# Keys and values gathered at a time, in elements.
WORKSPACE_ELEMENTS = 1 << 22


class DecodePlan:
    """What all layers share: the pages of the batch, and which query reads them.

    Pages are listed row after row, but for each row's last page, which come together at the
    end, one a row: only there may slots be unwritten, or hold what the row must not see.

    Attributes:
        num_rows: new tokens of the batch.
        pages: [num_pages] page numbers.
        rows: [num_pages] whose they are.
        copies: [num_pages] which of the 3 * num_rows turned queries reads them.
        unseen: [num_rows, block_size] true where the last page holds nothing for the row.
        tokens, turn, temperature: the turned queries, see `turn_queries`.
    """

    def __init__(
        self,
        query_start_loc: torch.Tensor,
        seq_lens: torch.Tensor,
        block_table: torch.Tensor,
        block_size: int,
        geometry: ChunkGeometry,
        original_max_position_embeddings: int | None = None,
    ) -> None:
        """Plan a step.

        Args:
            query_start_loc: [num_requests + 1], first row of each request.
            seq_lens: [num_requests], tokens of each request, the new ones included.
            block_table: [num_requests, max_blocks] int32.
            block_size: tokens a page; divides the chunk length.
            geometry: the chunk sizes.
            original_max_position_embeddings: switches the temperature on.
        """
        found = Rows.of(query_start_loc, seq_lens, geometry, original_max_position_embeddings)
        position = found.position
        self.num_rows = len(position)
        row = torch.arange(self.num_rows)
        last = position // block_size
        full_rows = row.repeat_interleave(last)
        full = torch.arange(len(full_rows)) - (last.cumsum(0) - last)[full_rows]
        index = torch.cat([full, last])
        self.rows = torch.cat([full_rows, row])
        self.pages = block_table[found.request[self.rows], index].long()
        self.unseen = torch.arange(block_size) > (position % block_size)[:, None]
        # 0, 1, 2: intra, succ, inter.
        chunk = position // geometry.chunk_len
        region = (chunk[self.rows] - index * block_size // geometry.chunk_len).clamp(max=2)
        self.copies = region * self.num_rows + self.rows

        self.tokens = row.repeat(3)
        self.turn = found.turn.flatten()
        self.temperature = None
        if found.temperature is not None:
            self.temperature = found.temperature.repeat(3)

    def parts(self, elements_per_page: int) -> Iterator[tuple[slice, torch.Tensor | None]]:
        """Pages that fit the workspace, and what is unseen of them if anything may be."""
        num_full = len(self.pages) - self.num_rows
        step = max(1, WORKSPACE_ELEMENTS // elements_per_page)
        for start in range(0, num_full, step):
            yield slice(start, min(start + step, num_full)), None
        yield slice(num_full, len(self.pages)), self.unseen


def decode_attention(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    output: torch.Tensor,
    *,
    plan: DecodePlan,
    rotation: QueryRotation,
    softmax_scale: float,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:
    """Attend from each row to all keys up to its own, in fp32.

    Every page gives a partial result of its own; these are merged at the end.

    Args:
        query: [num_rows, num_heads, head_size], rotated to their offsets.
        kv_cache: [num_blocks, num_kv_heads, block_size, 2 * head_size], any physical order.
        output: [num_rows, num_heads, head_size], written.
        plan: made once for all layers from the batch's lengths.
        rotation: how this layer turns queries.
        softmax_scale: factor on the dot products.
        k_scale: must be None, the cache is not quantised.
        v_scale: likewise.
    """
    _, num_kv_heads, block_size, width = kv_cache.shape
    heads = (num_kv_heads, query.shape[1] // num_kv_heads)
    turned = turn_queries(query.float(), rotation, plan.tokens, plan.turn, plan.temperature)
    turned = (turned * softmax_scale).unflatten(1, heads)  # [3 * rows, kv, group, size]

    partials = []
    for part, unseen in plan.parts(num_kv_heads * block_size * width):
        pages = kv_cache.index_select(0, plan.pages[part]).float()
        key, value = pages.chunk(2, dim=-1)  # [pages, kv, block, size]
        scores = turned[plan.copies[part]] @ key.transpose(-1, -2)
        if unseen is not None:
            scores = scores.masked_fill(unseen[:, None, None], -torch.inf)
            # Those slots may hold anything, NaN included, which 0 * NaN would spread.
            value.masked_fill_(unseen[:, None, :, None], 0.0)
        best = scores.amax(-1, keepdim=True)
        weights = (scores - best).exp_()
        partials.append((best, weights.sum(-1, keepdim=True), weights @ value))

    # [pages, kv, group, 1 or size]
    best, total, acc = (torch.cat(column) for column in zip(*partials, strict=True))
    index = plan.rows[:, None, None, None].expand_as(best)
    row_best = torch.full((plan.num_rows, *best.shape[1:]), -torch.inf)
    row_best.scatter_reduce_(0, index, best, "amax")
    weight = (best - row_best[plan.rows]).exp_()
    row_total = torch.zeros_like(row_best).index_add_(0, plan.rows, total * weight)
    row_acc = acc.new_zeros(plan.num_rows, *acc.shape[1:])
    row_acc.index_add_(0, plan.rows, acc * weight)
    output.copy_((row_acc / row_total).flatten(1, 2))
