"""Random batches in a paged cache, with what the reference says of them."""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from tests.helpers import specified
from tests.helpers.shapes import Shape
from vllm_dca.cpu import compiled, paged_pass
from vllm_dca.cpu.decode import decode_attention
from vllm_dca.cpu.merge import merge_parts
from vllm_dca.cpu.plan_decode import DecodePlan
from vllm_dca.method.device import Prefill, PrefillOperations
from vllm_dca.method.kv_cache import split_kv, write_kv
from vllm_dca.method.prefill import by_passes
from vllm_dca.method.rotary import QueryRotation, turn_queries, unit_table
from vllm_dca.reference.attention import key_positions, rotate

# Where Triton's kernels run.
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CPU = torch.device("cpu")
# Of an FP8 cache, which holds a key or value over its scale.
K_SCALE, V_SCALE = torch.tensor([0.5]), torch.tensor([2.0])
CPU_OPERATIONS = PrefillOperations(turn_queries, paged_pass.attention, merge_parts)
CPU_PREFILL = by_passes(CPU_OPERATIONS)


def query_start_loc(lengths: list[tuple[int, int]]) -> torch.Tensor:
    """First row of each request among the batch's new tokens."""
    new = torch.tensor([0] + [total - cached for total, cached in lengths])
    return new.cumsum(0).to(torch.int32)


@dataclass
class Batch:
    """Unrotated queries, keys and values of each request, and the paged cache that holds them.

    Pages that no request uses, and the slots past each request's end, hold NaN. What the
    reference says is worked out once: for other numbers, make another batch.
    """

    shape: Shape
    queries: list[torch.Tensor]
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    inv_freq: torch.Tensor
    kv_cache: torch.Tensor = field(init=False)
    block_table: torch.Tensor = field(init=False)

    @classmethod
    def random(cls, shape: Shape) -> "Batch":
        torch.manual_seed(shape.seed)

        def tokens(count: int, heads: int) -> torch.Tensor:
            return torch.randn(count, heads, shape.head_size, dtype=shape.dtype)

        kv_heads, heads = shape.num_kv_heads, shape.num_kv_heads * shape.group
        exponent = torch.arange(0, shape.rotary_dim, 2).double() / shape.rotary_dim
        return cls(
            shape,
            [tokens(total - cached, heads) for total, cached in shape.lengths],
            [tokens(total, kv_heads) for total, _ in shape.lengths],
            [tokens(total, kv_heads) for total, _ in shape.lengths],
            inv_freq=shape.rope_base**-exponent,
        )

    def __post_init__(self) -> None:
        shape = self.shape
        blocks = [-(-total // shape.block_size) for total, _ in shape.lengths]
        spare = 3
        # Apart from the numbers: batches of the same lengths have the same pages.
        generator = torch.Generator().manual_seed(shape.seed)
        pages = torch.randperm(sum(blocks) + spare, generator=generator)
        unused, pages = int(pages[0]), pages[spare:]
        size = [len(pages) + spare, shape.num_kv_heads, shape.block_size, 2 * shape.head_size]
        order = [0, 2, 1, 3] if shape.tokens_first else [0, 1, 2, 3]
        self.kv_cache = torch.full(
            [size[axis] for axis in order], torch.nan, dtype=shape.cache_dtype or shape.dtype
        ).permute(order)
        self.block_table = torch.full((len(blocks), max(blocks)), unused, dtype=torch.int32)
        for row, own in enumerate(pages.split(blocks)):
            self.block_table[row, : len(own)] = own
            slots = (own[:, None] * shape.block_size + torch.arange(shape.block_size)).flatten()
            key, value = self.keys[row], self.values[row]
            positions = key_positions(
                torch.arange(len(key)), shape.geometry.chunk_size, shape.local_size
            )
            rotated = self._rotated(key, positions)
            if shape.cache_dtype is not None:
                rotated = (rotated / K_SCALE).to(shape.cache_dtype)
                value = (value / V_SCALE).to(shape.cache_dtype)
                # What was stored is what the reference is asked about.
                self.values[row] = value.double() * V_SCALE
                self.keys[row] = self._unrotated(rotated.double() * K_SCALE, positions)
            write_kv(rotated, value, self.kv_cache, slots[: len(key)])

    def _rotated(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        shape = self.shape
        rotated = rotate(x.double(), positions, self.inv_freq, shape.is_neox)
        # A YaRN table lengthens what it rotates.
        rotated[..., : shape.rotary_dim] *= shape.mscale
        return rotated.to(shape.dtype)

    def _unrotated(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x[..., : self.shape.rotary_dim] /= self.shape.mscale
        return rotate(x, -positions, self.inv_freq, self.shape.is_neox)

    def scales(self, device: torch.device) -> dict[str, torch.Tensor]:
        """For what reads the cache."""
        if self.shape.cache_dtype is None:
            return {}
        return {"k_scale": K_SCALE.to(device), "v_scale": V_SCALE.to(device)}

    def softmax(self, device: torch.device = CPU) -> dict[str, Any]:
        """What it has besides the scores of the keys."""
        heads = self.shape.num_kv_heads * self.shape.group
        generator = torch.Generator().manual_seed(self.shape.seed)
        # Some count for nothing, some for more than all keys.
        sinks = self.shape.sinks_at + 4 * torch.randn(heads, generator=generator)
        return {
            "soft_cap": self.shape.soft_cap,
            "sinks": sinks.to(device, self.shape.dtype) if self.shape.has_sinks else None,
        }

    def rotated_query(self) -> torch.Tensor:
        """What the model hands to the attention layer."""
        return torch.cat(
            [
                self._rotated(query, torch.arange(cached, total) % self.shape.chunk_len)
                for query, (total, cached) in zip(self.queries, self.shape.lengths, strict=True)
            ]
        )

    def rotation(self, device: torch.device = CPU) -> QueryRotation:
        size = self.shape.geometry.chunk_size
        angle = torch.arange(size)[:, None] * self.inv_freq
        table = self.shape.mscale * torch.cat([angle.cos(), angle.sin()], dim=-1)
        return QueryRotation(unit_table(table.float(), size).to(device), self.shape.is_neox)

    def reference(self, dtype: torch.dtype) -> torch.Tensor:
        """The specification's answer, computed in `dtype`."""
        sinks = self.softmax()["sinks"]
        return torch.cat(
            [
                specified.answer(self.shape, request, self.inv_freq, sinks, dtype)
                for request in zip(self.queries, self.keys, self.values, strict=True)
            ]
        )

    @functools.cached_property
    def exact(self) -> torch.Tensor:
        """The specification's answer in fp64."""
        return self.reference(torch.float64)

    def prefill(
        self,
        query: torch.Tensor | None = None,
        rows: slice = slice(None),
        by: Prefill = CPU_PREFILL,
        device: torch.device = CPU,
    ) -> torch.Tensor:
        """By three passes and a merge, or by what else answers prefills."""
        shape = self.shape
        query = (self.rotated_query() if query is None else query).to(device)
        key_cache, value_cache = split_kv(self.kv_cache.to(device))
        lengths = torch.tensor(shape.lengths)[rows]
        output = torch.full_like(query, torch.nan)
        by.attend(
            query,
            key_cache,
            value_cache,
            output,
            plan=by.plan(
                query_start_loc(shape.lengths[rows]).numpy(),
                lengths[:, 0].numpy(),
                self.block_table[rows].to(device),
                shape.block_size,
                shape.geometry,
                shape.original_max_position_embeddings,
            ),
            rotation=self.rotation(device),
            softmax_scale=shape.scale,
            **self.softmax(device),
            **self.scales(device),
        )
        return output.cpu()

    def decode(
        self, query: torch.Tensor | None = None, rows: slice = slice(None)
    ) -> torch.Tensor:
        """The CPU's paged decode, in torch."""
        return self._planned(DecodePlan, decode_attention, query, rows)

    def compiled(
        self,
        query: torch.Tensor | None = None,
        rows: slice = slice(None),
        plan: Callable[..., compiled.CompiledPlan] = compiled.CompiledPlan,
        output: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The CPU's compiled kernel, for any rows; into a dense tensor, or into the output."""
        return self._planned(plan, compiled.attention, query, rows, output)

    def _planned(
        self,
        plan: Callable[..., Any],
        attention: Callable[..., None],
        query: torch.Tensor | None = None,
        rows: slice = slice(None),
        output: torch.Tensor | None = None,
    ) -> torch.Tensor:
        shape, lengths = self.shape, self.shape.lengths[rows]
        query = self.rotated_query() if query is None else query
        if output is None:
            output = torch.full_like(query, torch.nan)
        attention(
            query,
            self.kv_cache,
            output,
            plan=plan(
                query_start_loc(lengths),
                torch.tensor([total for total, _ in lengths], dtype=torch.int32),
                self.block_table[rows],
                shape.block_size,
                shape.geometry,
                shape.original_max_position_embeddings,
            ),
            rotation=self.rotation(),
            softmax_scale=shape.scale,
            **self.softmax(),
        )
        return output

    @functools.cached_property
    def tolerance(self) -> float:
        """How far from fp64 an ordinary computation in the batch's dtype ends up.

        The reference itself, run in that dtype, rounds queries, keys, scores, weights and
        output once each. The fast path rounds a turned query and a partial output once more,
        hence twice its error; eps times the largest value is there for the batches where the
        ordinary one happens to be exact (a single key). It is asked for this batch, whose
        scores may be larger than others', and for every row of whole sequences, of several
        batches if these are short: one row may be lucky. Rows that see few keys are furthest
        off, so that the first ones of long sequences do.

        Parts are merged by their log-sum-exps in fp32. Each is off by half a rounding at most,
        and so is its part's weight; values of two parts are at most twice the largest apart.
        """
        shape = dataclasses.replace(
            self.shape, lengths=[(min(total, 256), 0) for total, _ in self.shape.lengths]
        )
        rows = sum(total for total, _ in shape.lengths)
        outputs = rows * shape.num_kv_heads * shape.group * shape.head_size
        others = (
            Batch.random(dataclasses.replace(shape, seed=shape.seed + 1000 * sample))
            for sample in range(min(-(-4000 // outputs), 16))
        )
        ordinary = largest = 0.0
        for batch in (self, *others):
            rounded = batch.reference(shape.dtype).double()
            ordinary = max(ordinary, (rounded - batch.exact).abs().max().item())
            largest = max(largest, *(value.abs().max().item() for value in batch.values))
        log_sum_exp = max(
            specified.largest_log_sum_exp(self.shape, query, key, self.inv_freq)
            for query, key in zip(self.queries, self.keys, strict=True)
        )
        merging = torch.finfo(torch.float32).eps * log_sum_exp
        return 2 * ordinary + (2 * torch.finfo(shape.dtype).eps + merging) * largest

    def assert_close(self, output: torch.Tensor) -> None:
        error = (output.double() - self.exact).abs().max().item()
        assert error <= self.tolerance, f"{error} > {self.tolerance} for {self.shape}"
