"""A step's sparse segments as the kernels want them; once a step, for all layers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from vllm_dca.method.geometry import ChunkGeometry
from vllm_dca.method.planning import Arrays, QueryTurns, turns_of, upload
from vllm_dca.method.sparse_config import TILE
from vllm_dca.method.sparse_operations import SparsePlan
from vllm_dca.method.sparse_planning import Segment
from vllm_dca.method.vertical_slash import PROBE

# Of a segment's row in `Probe.segments`: where its keys end, its row of the block table, its
# first place in the buffers, its first position, its first row among the round's.
COLUMNS = 8
PLACES = 1024  # a segment's places in the buffers are a multiple of this


def places_of(end: int) -> int:
    """A place for each key and each distance of a segment."""
    return -(-(end + TILE + 1) // PLACES) * PLACES


@dataclass
class Probe:
    """The last rows of segments, which say what their lines weigh.

    Attributes:
        queries: segment by segment, three copies of PROBE rows.
        segments: [num_segments, COLUMNS] int32.
        ends: where each segment's keys end.
    """

    queries: QueryTurns
    segments: torch.Tensor
    ends: Sequence[int]


@dataclass
class Round:
    """As many segments as the buffers hold: all of a step's, but for very many long requests.

    Attributes:
        probe: of each segment.
        queries: three copies of all rows; the first of them are the rows themselves.
        num_rows: of all segments.
        tiles: [num_tiles, 2] int32, each one's segment and its first position, a multiple of
            TILE.
    """

    probe: Probe
    queries: QueryTurns
    num_rows: int
    tiles: torch.Tensor


@dataclass
class DevicePlan:
    """A step, on the device.

    Attributes:
        rounds: at least one.
        block_table: [num_requests, max_blocks] int32.
        geometry: the chunk sizes.
        host: what it was made from.
    """

    rounds: list[Round]
    block_table: torch.Tensor
    geometry: ChunkGeometry
    host: SparsePlan


def plan_step(plan: SparsePlan, capacity: int, continuous: bool) -> DevicePlan:
    """Lay a step out, and copy that to the device without blocking.

    Args:
        plan: of the step; its block table is on the device.
        capacity: places in the buffers.
        continuous: whether weights have positions without DCA's clamps.
    """
    taken = list(_rounds(plan.segments, capacity))
    arrays: list[Arrays] = []
    for segments in taken:
        arrays += [
            _row_copies(plan, segments),
            _probe_copies(plan, segments, continuous),
            {"segments": _table(segments), "tiles": _tiles(segments)},
        ]
    there = upload(arrays, plan.block_table.device)
    rounds = [
        Round(
            _probe(probe, tables, segments),
            QueryTurns(**rows),
            sum(each.end - each.begin for each in segments),
            tables["tiles"].view(-1, 2),
        )
        for segments, rows, probe, tables in zip(
            taken, there[::3], there[1::3], there[2::3], strict=True
        )
    ]
    return DevicePlan(rounds, plan.block_table, plan.geometry, plan)


def plan_probe(plan: SparsePlan, segment: Segment, continuous: bool) -> Probe:
    """The probe of one segment, whose first token is its query's first."""
    segments = [segment._replace(first=0)]
    probe, tables = upload(
        [_probe_copies(plan, segments, continuous), {"segments": _table(segments)}],
        plan.block_table.device,
    )
    return _probe(probe, tables, segments)


def _probe(
    turns: dict[str, torch.Tensor], tables: dict[str, torch.Tensor], segments: list[Segment]
) -> Probe:
    table = tables["segments"].view(-1, COLUMNS)
    return Probe(QueryTurns(**turns), table, [each.end for each in segments])


def _rounds(segments: list[Segment], capacity: int) -> Iterator[list[Segment]]:
    taken: list[Segment] = []
    places = 0
    for segment in segments:
        own = places_of(segment.end)
        if taken and places + own > capacity:
            yield taken
            taken, places = [], 0
        taken.append(segment)
        places += own
    yield taken


def _row_copies(plan: SparsePlan, segments: list[Segment]) -> Arrays:
    """Three copies of all rows, region after region."""
    parts = [_copies(plan, each, each.begin, False) for each in segments]
    return {
        name: np.concatenate([part[name] for part in parts], axis=1).ravel()
        for name in parts[0]
    }


def _probe_copies(plan: SparsePlan, segments: list[Segment], continuous: bool) -> Arrays:
    """Three copies of the last rows, segment after segment."""
    parts = [_copies(plan, each, each.end - PROBE, continuous) for each in segments]
    return {name: np.stack([part[name] for part in parts]).ravel() for name in parts[0]}


def _copies(plan: SparsePlan, segment: Segment, begin: int, continuous: bool) -> Arrays:
    """[3, num_rows] each, of a segment's rows from `begin` on; named as in `QueryTurns`."""
    length = plan.original_max_position_embeddings
    position = np.arange(begin, segment.end)
    turn, temperature = turns_of(position, plan.geometry, length, continuous)
    token = position + segment.first - segment.begin
    arrays: Arrays = {"tokens": np.tile(token, (3, 1)), "turn": turn.numpy()}
    if temperature is not None:
        arrays["temperature"] = np.tile(temperature.numpy(), (3, 1))
    return arrays


def _table(segments: list[Segment]) -> npt.NDArray[np.int64]:
    """`Probe.segments`, flat."""
    table = np.zeros((len(segments), COLUMNS), dtype=np.int64)
    place = row = 0
    for i, each in enumerate(segments):
        table[i, :5] = each.end, each.request, place, each.begin, row
        place += places_of(each.end)
        row += each.end - each.begin
    return table.ravel()


def _tiles(segments: list[Segment]) -> npt.NDArray[np.int64]:
    """`Round.tiles`, flat."""
    starts = [np.arange(each.begin // TILE * TILE, each.end, TILE) for each in segments]
    return np.concatenate(
        [np.stack([np.full_like(start, i), start], axis=1) for i, start in enumerate(starts)]
    ).ravel()
