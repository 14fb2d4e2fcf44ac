"""How a decode step is cut into equal shares; worked out on the device, in one launch."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from vllm_dca.method.geometry import ChunkGeometry

# Keys; what shares are counted in. No side of a matrix product is smaller.
UNIT = 16
# What it costs to begin with a pack, in units: its queries and its first tile are waited for.
PACK_COST = 4
# No share is smaller, in units: else a program would write as much as it reads.
MIN_SHARE = 12
# Rows times query heads that one program multiplies at once.
MAX_QUERIES = 64
PROGRAMS_PER_MULTIPROCESSOR = 2
BLOCK = 1024  # of packs, planned side by side
SEARCH = 256  # of packs, looked at side by side


def programs(num_multiprocessors: int) -> int:
    """How many share a step's work.

    With one row a request `vllm_dca.cuda.tuning` leaves room for so many at once on 8.0, 9.0
    and 10.0. Else half of them run after the others.
    """
    return PROGRAMS_PER_MULTIPROCESSOR * num_multiprocessors


def rows_a_pack(group: int) -> int:
    """How many rows read the cache together, where `group` query heads share a KV head.

    A prefill of so few tokens is better decoded: each key and value is read once, and no pass
    can read it less often. One token more would have to read all of them again.
    """
    return max(MAX_QUERIES // group, 1)


@dataclass
class DecodePlan:
    """Views of a planner's buffers, which keep their addresses from step to step.

    Rows of a request that come after one another are a pack: they read the cache together.
    A pack counts PACK_COST units, and then those of the keys that its last row sees; a step's
    units are those of all packs for each KV head. Programs take shares of equal size, in order.

    Attributes:
        block_table: [num_requests, max_pages] int32, pages of each request.
        row_keys: [num_rows] int32, keys that the row sees, its own included; 0 for a row that
            only pads the batch.
        packs: [max_packs, 4] int32: request, first row, rows, keys that the last row sees.
        first_unit: [max_packs + 1] int32, running sum of the packs' units for one KV head.
        pack_rows: the most rows of a pack.
        num_programs: how many share the work.
        geometry: the chunk sizes.
        original_max_position_embeddings: switches the temperature on.
    """

    block_table: torch.Tensor
    row_keys: torch.Tensor
    packs: torch.Tensor
    first_unit: torch.Tensor
    pack_rows: int
    num_programs: int
    geometry: ChunkGeometry
    original_max_position_embeddings: int | None


class DecodePlanner:
    """Plans steps in place, in one launch each."""

    def __init__(
        self,
        geometry: ChunkGeometry,
        original_max_position_embeddings: int | None,
        max_rows: int,
        group: int,
        num_programs: int,
        device: torch.device,
    ) -> None:
        """Allocate for the largest step.

        Args:
            geometry: the chunk sizes.
            original_max_position_embeddings: switches the temperature on.
            max_rows: new tokens of a step at most, padding included; no fewer than requests.
            group: query heads that share a KV head, of the layer that has most.
            num_programs: how many share the work.
            device: of everything.
        """
        self.geometry = geometry
        self.original_max_position_embeddings = original_max_position_embeddings
        self.pack_rows = rows_a_pack(group)
        self.num_programs = num_programs

        def buffer(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        self.row_keys = buffer(max_rows)
        self.request_pack = buffer(max_rows)
        self.packs = buffer(max_rows, 4)
        self.first_unit = buffer(max_rows + 1)

    def plan(
        self,
        query_start_loc: torch.Tensor,
        seq_lens: torch.Tensor,
        block_table: torch.Tensor,
        num_rows: int,
        max_query_len: int | None = None,
    ) -> DecodePlan:
        """See `vllm_dca.method.device.PlanDecode`.

        Raises:
            RuntimeError: the step is larger than the planner's buffers.
        """
        num_requests = len(seq_lens)
        if max(num_rows, num_requests) > len(self.row_keys):
            raise RuntimeError(
                f"DCA has to decode {num_rows} rows of {num_requests} requests, and made ready "
                f"for {len(self.row_keys)} of each."
            )
        # A launch takes no numpy integers, which some of vLLM's batches have here.
        num_rows = int(num_rows)
        # A graph is captured for these two numbers, so they alone say how an even batch is
        # packed. No uneven one is captured.
        each, uneven = divmod(num_rows, num_requests)
        most = each if uneven == 0 else int(max_query_len or self.pack_rows)
        pack_rows = max(min(most, self.pack_rows), 1)
        max_packs = min(num_rows, num_requests + num_rows // pack_rows)
        plan = DecodePlan(
            block_table,
            self.row_keys[:num_rows],
            self.packs[:max_packs],
            self.first_unit[: max_packs + 1],
            pack_rows,
            self.num_programs,
            self.geometry,
            self.original_max_position_embeddings,
        )
        _plan_kernel[(1,)](
            query_start_loc,
            seq_lens,
            self.request_pack,
            plan.row_keys,
            plan.packs,
            plan.first_unit,
            num_requests,
            num_rows,
            max_packs,
            pack_rows,
            num_requests.bit_length(),
            UNIT=UNIT,
            PACK_COST=PACK_COST,
            BLOCK=BLOCK,
        )
        return plan


@triton.jit
def share_of(first_unit, num_packs, sequences, num_programs, MIN_SHARE: tl.constexpr):
    """A step's units, and how many of them a program takes; int64."""
    units = tl.load(first_unit + num_packs).to(tl.int64) * sequences
    used = tl.minimum(tl.maximum(units // MIN_SHARE, 1), num_programs)
    return units, (units + used - 1) // used


@triton.jit
def pack_at(first_unit, num_packs, sequences, unit, SEARCH: tl.constexpr):
    """The pack that a unit of the step belongs to; all of them are looked at side by side."""
    passed = 0
    for base in range(0, num_packs, SEARCH):
        pack = base + tl.arange(0, SEARCH)
        inside = pack < num_packs
        end = tl.load(first_unit + 1 + pack, mask=inside, other=0).to(tl.int64) * sequences
        passed += tl.sum((inside & (end <= unit)).to(tl.int32), 0)
    return passed


@triton.jit
def _ends_up_to(ends, x, count, steps, inside):
    """How many of the ascending `ends` [count] are at most x; a binary search."""
    lo = tl.zeros_like(x)
    hi = tl.zeros_like(x) + count
    for _ in range(steps):
        middle = (lo + hi) // 2
        open_ = inside & (lo < hi)
        end = tl.load(ends + middle, mask=open_, other=0)
        passed = open_ & (end <= x)
        hi = tl.where(open_ & (end > x), middle, hi)
        lo = tl.where(passed, middle + 1, lo)
    return lo


@triton.jit(
    do_not_specialize=["num_requests", "num_rows", "num_packs", "pack_rows", "request_steps"]
)
def _plan_kernel(
    query_start_loc,
    seq_lens,
    request_pack,  # [num_requests] int32, each request's first pack
    row_keys,
    packs,
    first_unit,
    num_requests,
    num_rows,
    num_packs,
    pack_rows,
    request_steps,
    UNIT: tl.constexpr,
    PACK_COST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first = 0
    for base in range(0, num_requests, BLOCK):
        request = base + tl.arange(0, BLOCK)
        inside = request < num_requests
        start = tl.load(query_start_loc + request, mask=inside, other=0)
        rows = tl.load(query_start_loc + request + 1, mask=inside, other=0) - start
        count = (rows + pack_rows - 1) // pack_rows
        tl.store(request_pack + request, first + tl.cumsum(count, 0) - count, mask=inside)
        first += tl.sum(count, 0)
    # Packs that the last step had, and this one has not.
    for base in range(0, num_packs, BLOCK):
        pack = base + tl.arange(0, BLOCK)
        tl.store(packs + 4 * pack + 3, 0, mask=pack < num_packs)
    tl.debug_barrier()

    for base in range(0, num_rows, BLOCK):
        row = base + tl.arange(0, BLOCK)
        inside = row < num_rows
        request = _ends_up_to(query_start_loc + 1, row, num_requests, request_steps, inside)
        real = inside & (request < num_requests)
        start = tl.load(query_start_loc + request, mask=real, other=0)
        end = tl.load(query_start_loc + request + 1, mask=real, other=0)
        seq_len = tl.load(seq_lens + request, mask=real, other=0)
        keys = seq_len - (end - 1 - row)
        tl.store(row_keys + row, tl.where(real, tl.maximum(keys, 0), 0), mask=inside)
        place = row - start
        pack = tl.load(request_pack + request, mask=real, other=0) + place // pack_rows
        rows = tl.minimum(pack_rows, end - row)
        opens = real & (place % pack_rows == 0)
        tl.store(packs + 4 * pack, request, mask=opens)
        tl.store(packs + 4 * pack + 1, row, mask=opens)
        tl.store(packs + 4 * pack + 2, rows, mask=opens)
        tl.store(packs + 4 * pack + 3, tl.maximum(keys + rows - 1, 0), mask=opens)
    tl.debug_barrier()

    first = 0
    tl.store(first_unit, first)
    for base in range(0, num_packs, BLOCK):
        pack = base + tl.arange(0, BLOCK)
        inside = pack < num_packs
        keys = tl.load(packs + 4 * pack + 3, mask=inside, other=0)
        units = tl.where(keys > 0, (keys + UNIT - 1) // UNIT + PACK_COST, 0)
        tl.store(first_unit + 1 + pack, first + tl.cumsum(units, 0), mask=inside)
        first += tl.sum(units, 0)
