"""How a decode step is cut into splits; worked out on the device."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from vllm_dca.method.geometry import ChunkGeometry

# Splits are whole tiles of the widest kind, and never so short that starting one costs more
# than it brings.
MAX_TILE = 64
MIN_SPLIT = 4 * MAX_TILE
BLOCK = 1024
# Four fit a multiprocessor at once, and keep its memory busy.
PROGRAMS_PER_MULTIPROCESSOR = 4


def spare_slots(num_multiprocessors: int, num_kv_heads: int) -> int:
    """Splits beyond one a row with which the KV heads fill a device."""
    return -(-PROGRAMS_PER_MULTIPROCESSOR * num_multiprocessors // num_kv_heads)


@dataclass
class DecodePlan:
    """Views of a planner's buffers, which keep their addresses from step to step.

    Attributes:
        block_table: [num_requests, max_pages] int32, pages of each request.
        row_request: [num_rows] int32, index of the row's request.
        row_keys: [num_rows] int32, keys that the row sees, its own included; 0 for a row that
            only pads the batch.
        first_slot: [num_rows + 1] int32, the row's splits are slots first_slot[r] ..
            first_slot[r + 1] - 1.
        slot_row: [num_slots] int32, the slot's row, or -1 for none.
        split_len: [1] int32, keys a split.
        geometry: the chunk sizes.
        original_max_position_embeddings: switches the temperature on.
    """

    block_table: torch.Tensor
    row_request: torch.Tensor
    row_keys: torch.Tensor
    first_slot: torch.Tensor
    slot_row: torch.Tensor
    split_len: torch.Tensor
    geometry: ChunkGeometry
    original_max_position_embeddings: int | None


class DecodePlanner:
    """Plans steps in place, in one launch each."""

    def __init__(
        self,
        geometry: ChunkGeometry,
        original_max_position_embeddings: int | None,
        max_rows: int,
        spare_slots: int,
        device: torch.device,
    ) -> None:
        """Allocate for the largest step.

        Args:
            geometry: the chunk sizes.
            original_max_position_embeddings: switches the temperature on.
            max_rows: new tokens of a step at most, padding included.
            spare_slots: splits beyond one a row; with the KV heads they fill the device.
            device: of everything.
        """
        self.geometry = geometry
        self.original_max_position_embeddings = original_max_position_embeddings
        self.spare_slots = spare_slots

        def buffer(length: int) -> torch.Tensor:
            return torch.zeros(length, dtype=torch.int32, device=device)

        self.row_request = buffer(max_rows)
        self.row_keys = buffer(max_rows)
        self.first_slot = buffer(max_rows + 1)
        self.slot_row = buffer(max_rows + spare_slots)
        self.split_len = buffer(1)

    def plan(
        self,
        query_start_loc: torch.Tensor,
        seq_lens: torch.Tensor,
        block_table: torch.Tensor,
        num_rows: int,
    ) -> DecodePlan:
        """Plan a step.

        Args:
            query_start_loc: [num_requests + 1] int32 on the device, first row of each request.
            seq_lens: [num_requests] int32 on the device, tokens of each request, new included.
            block_table: [num_requests, max_pages] int32 on the device.
            num_rows: rows to answer; those past the last request's are padding.
        """
        num_requests = len(seq_lens)
        num_slots = num_rows + self.spare_slots
        plan = DecodePlan(
            block_table,
            self.row_request[:num_rows],
            self.row_keys[:num_rows],
            self.first_slot[: num_rows + 1],
            self.slot_row[:num_slots],
            self.split_len,
            self.geometry,
            self.original_max_position_embeddings,
        )
        _plan_kernel[(1,)](
            query_start_loc,
            seq_lens,
            plan.row_request,
            plan.row_keys,
            plan.first_slot,
            plan.slot_row,
            plan.split_len,
            num_requests,
            num_rows,
            self.spare_slots,
            num_requests.bit_length(),
            num_rows.bit_length(),
            TILE=MAX_TILE,
            MIN_SPLIT=MIN_SPLIT,
            BLOCK=BLOCK,
        )
        return plan


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


@triton.jit(do_not_specialize=["num_requests", "num_rows", "request_steps", "row_steps"])
def _plan_kernel(
    query_start_loc,
    seq_lens,
    row_request,
    row_keys,
    first_slot,
    slot_row,
    split_len,
    num_requests,
    num_rows,
    spare_slots,
    request_steps,
    row_steps,
    TILE: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Whose each row is, and how much it sees.
    all_keys = tl.zeros([BLOCK], tl.int64)
    for base in range(0, num_rows, BLOCK):
        row = base + tl.arange(0, BLOCK)
        inside = row < num_rows
        request = _ends_up_to(query_start_loc + 1, row, num_requests, request_steps, inside)
        real = inside & (request < num_requests)
        seq_len = tl.load(seq_lens + request, mask=real, other=0)
        last_row = tl.load(query_start_loc + request + 1, mask=real, other=0) - 1
        keys = tl.where(real, tl.maximum(seq_len - (last_row - row), 0), 0)
        tl.store(row_request + row, tl.where(real, request, 0), mask=inside)
        tl.store(row_keys + row, keys, mask=inside)
        all_keys += keys
    # Splits of this length need at most spare_slots + num_rows slots.
    wanted = (tl.sum(all_keys, 0) + spare_slots - 1) // spare_slots
    length = tl.maximum((wanted + TILE - 1) // TILE * TILE, MIN_SPLIT).to(tl.int32)
    tl.store(split_len, length)
    tl.debug_barrier()

    first = 0
    tl.store(first_slot, first)
    for base in range(0, num_rows, BLOCK):
        row = base + tl.arange(0, BLOCK)
        inside = row < num_rows
        keys = tl.load(row_keys + row, mask=inside, other=0)
        splits = (keys + length - 1) // length
        tl.store(first_slot + row + 1, first + tl.cumsum(splits, 0), mask=inside)
        first += tl.sum(splits, 0)
    tl.debug_barrier()

    num_slots = num_rows + spare_slots
    for base in range(0, num_slots, BLOCK):
        slot = base + tl.arange(0, BLOCK)
        inside = slot < num_slots
        row = _ends_up_to(first_slot + 1, slot, num_rows, row_steps, inside)
        tl.store(slot_row + slot, tl.where(row < num_rows, row, -1), mask=inside)
