"""How a decode step reads its pages; worked out once for all layers."""

from collections.abc import Iterator

import torch

from vllm_dca.cpu.rows import Rows
from vllm_dca.method.geometry import ChunkGeometry

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
