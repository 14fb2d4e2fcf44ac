"""One attention layer with a random paged cache, to time, and to check before it is timed."""

from typing import Any

import torch

from vllm_dca.method.device import Prefill
from vllm_dca.method.geometry import ChunkGeometry
from vllm_dca.method.kv_cache import split_kv
from vllm_dca.method.rotary import QueryRotation
from vllm_dca.reference.attention import dual_chunk_attention, key_positions, rotate


class Layer:
    """Paged keys and values and the queries of a batch, random, each request's pages scattered.

    The shape is a name, query heads, KV heads, head size, chunk_size and local_size; each of
    `batch` requests has `context` tokens, the last `new` of them queries.
    """

    def __init__(
        self,
        shape: tuple[Any, ...],
        batch: int,
        context: int,
        new: int,
        dtype: torch.dtype,
        page: int,
        device: str,
    ) -> None:
        self.name, heads, self.kv_heads, self.head_size, *sizes = shape
        self.geometry = ChunkGeometry(*sizes)
        self.context, self.new, self.group = context, new, heads // self.kv_heads
        self.page = page
        torch.manual_seed(0)
        pages = -(-context // page)
        size = (batch * pages, self.kv_heads, page, 2 * self.head_size)
        self.kv_cache = torch.randn(size, dtype=dtype, device=device)
        table = torch.randperm(batch * pages, device=device).int()
        self.block_table = table.view(batch, pages)
        self.query = torch.randn(batch * new, heads, self.head_size, dtype=dtype, device=device)
        self.output = torch.empty_like(self.query)
        self.inv_freq = 1e6 ** -(torch.arange(0, self.head_size, 2) / self.head_size).double()
        angle = torch.arange(sizes[0] + 1)[:, None] * self.inv_freq
        table = torch.cat([angle.cos(), angle.sin()], -1).float().to(device)
        self.rotation = QueryRotation(table, True)
        self.starts = torch.arange(batch + 1, dtype=torch.int32) * new
        self.seq_lens = torch.full((batch,), context, dtype=torch.int32)
        self.scale = self.head_size**-0.5

    def plan_prefill(self, by: Prefill, geometry: ChunkGeometry | None = None) -> Any:
        lengths = self.starts.numpy(), self.seq_lens.numpy()
        return by.plan(*lengths, self.block_table, self.page, geometry or self.geometry)

    def prefill(self, plan: Any, by: Prefill) -> None:
        by.attend(
            self.query,
            *split_kv(self.kv_cache),
            self.output,
            plan=plan,
            rotation=self.rotation,
            softmax_scale=self.scale,
        )

    def check(
        self, output: torch.Tensor | None = None, geometry: ChunkGeometry | None = None
    ) -> None:
        """First, middle and last tokens of the first and last request against fp64.

        Each is checked for one KV head, the first or the last; all others must be finite.

        Args:
            output: another than the layer's own.
            geometry: likewise. With chunks longer than the context, it is ordinary attention.
        """
        output = self.output if output is None else output
        geometry = geometry or self.geometry
        assert output.isfinite().all(), self.name
        requests, heads, last = len(self.seq_lens), self.kv_heads, self.new - 1
        for request, row, head in (
            (0, last, 0),
            (0, 0, heads - 1),
            (requests - 1, last // 2, 0),
            (requests - 1, last, heads - 1),
        ):
            self._check_row(output, geometry, request, row, head)

    def _check_row(
        self, output: torch.Tensor, geometry: ChunkGeometry, request: int, row: int, head: int
    ) -> None:
        """One token's answer for one KV head; a peer's as an ordinary one in bfloat16.

        A peer may approximate its softmax; that it attends to the same keys is what matters.
        """
        tokens = self.context - self.new + row + 1
        pages = self.kv_cache[self.block_table[request].long(), head : head + 1]
        key, value = pages.transpose(1, 2).flatten(0, 1)[:tokens].cpu().double().chunk(2, -1)
        c, w = geometry.chunk_size, geometry.local_size
        standing = key_positions(torch.arange(tokens), c, w)
        which = request * self.new + row, slice(head * self.group, (head + 1) * self.group)
        query = self.query[which][None].cpu().double()
        query, key = (
            rotate(x, -p, self.inv_freq) for x, p in ((query, standing[-1:]), (key, standing))
        )

        def reference(dtype: torch.dtype) -> torch.Tensor:
            return dual_chunk_attention(
                query.to(dtype),
                key.to(dtype),
                value.to(dtype),
                chunk_size=c,
                local_size=w,
                inv_freq=self.inv_freq,
                scale=self.scale,
                dtype=dtype,
            )[0].double()

        exact = reference(torch.float64)
        # As in the tests: twice the error of an ordinary computation in the same dtype.
        ordinary = self.query.dtype if output is self.output else torch.bfloat16
        allowed = 2 * (reference(ordinary) - exact).abs().max().item()
        allowed += 2 * torch.finfo(ordinary).eps * exact.abs().max().item()
        error = (output[which].cpu().double() - exact).abs().max().item()
        assert error <= allowed, f"{self.name}, {tokens} tokens: {error} > {allowed}"
