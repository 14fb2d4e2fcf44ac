"""A step's sparse segments as the kernels want them; once a step, for all layers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from vllm_dca.method.geometry import ChunkGeometry
from vllm_dca.method.lines import PROBE
from vllm_dca.method.planning import turns_of, upload
from vllm_dca.method.sparse import SparsePlan
from vllm_dca.method.sparse_config import TILE
from vllm_dca.method.sparse_planning import Segment

# Of a segment's row in `Probe.segments`: where its keys end, its row of the block table, its
# first place in the buffers, its first position, its first row among the round's.
COLUMNS = 8
PLACES = 1024  # a segment's places in the buffers are a multiple of this


def places_of(end: int) -> int:
    """A place for each key and each distance of a segment."""
    return -(-(end + TILE + 1) // PLACES) * PLACES


class Turned(NamedTuple):
    """Copies of queries, for intra, succ and inter.

    Attributes:
        tokens: [num_copies] int32, index of the token to take the query from.
        turn: [num_copies] int32, positions to turn it further.
        temperature: [num_copies] fp32, factor to scale it by; None where there is none.
    """

    tokens: torch.Tensor
    turn: torch.Tensor
    temperature: torch.Tensor | None


@dataclass
class Probe:
    """The last rows of segments, which say what their lines weigh.

    Attributes:
        queries: segment by segment, three copies of PROBE rows.
        segments: [num_segments, COLUMNS] int32.
        ends: where each segment's keys end.
    """

    queries: Turned
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
    queries: Turned
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


Arrays = dict[str, npt.NDArray[np.generic]]


def plan_step(plan: SparsePlan, capacity: int, continuous: bool) -> DevicePlan:
    """Lay a step out, and copy that to the device without blocking.

    Args:
        plan: of the step; its block table is on the device.
        capacity: places in the buffers.
        continuous: whether weights have positions without DCA's clamps.
    """
    arrays: Arrays = {}
    taken = list(_rounds(plan.segments, capacity))
    for number, segments in enumerate(taken):
        parts = [_turns(plan, each, each.begin, each.end, False) for each in segments]
        _add(
            arrays,
            f"rows {number}",
            [np.concatenate(p, axis=1) for p in zip(*parts, strict=True)],
        )
        arrays[f"tiles {number}"] = _tiles(segments)
        _add_probe(arrays, f"probe {number}", plan, segments, continuous)
    there = upload(arrays, plan.block_table.device)
    return DevicePlan(
        [
            Round(
                _probe(there, f"probe {number}", segments),
                _turned(there, f"rows {number}"),
                sum(each.end - each.begin for each in segments),
                there[f"tiles {number}"].view(-1, 2),
            )
            for number, segments in enumerate(taken)
        ],
        plan.block_table,
        plan.geometry,
        plan,
    )


def plan_probe(plan: SparsePlan, segment: Segment, continuous: bool) -> Probe:
    """The probe of one segment, whose first token is its query's first."""
    arrays: Arrays = {}
    _add_probe(arrays, "probe", plan, [segment._replace(first=0)], continuous)
    there = upload(arrays, plan.block_table.device)
    return _probe(there, "probe", [segment])


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


def _turns(
    plan: SparsePlan, segment: Segment, begin: int, end: int, continuous: bool
) -> list[npt.NDArray[np.generic]]:
    """[3, num_rows] of tokens, turns and, where there is one, the temperature."""
    length = plan.original_max_position_embeddings
    position = np.arange(begin, end)
    turn, temperature = turns_of(position, plan.geometry, length, continuous)
    token = position + segment.first - segment.begin
    found: list[npt.NDArray[np.generic]] = [np.tile(token, (3, 1)), turn.numpy()]
    if temperature is not None:
        found.append(np.tile(temperature.numpy().view(np.int32), (3, 1)))
    return found


def _tiles(segments: list[Segment]) -> npt.NDArray[np.int64]:
    starts = [np.arange(each.begin // TILE * TILE, each.end, TILE) for each in segments]
    return np.concatenate(
        [np.stack([np.full_like(start, i), start], axis=1) for i, start in enumerate(starts)]
    ).ravel()


def _add_probe(
    arrays: Arrays, name: str, plan: SparsePlan, segments: list[Segment], continuous: bool
) -> None:
    parts = [_turns(plan, each, each.end - PROBE, each.end, continuous) for each in segments]
    _add(arrays, name, [np.stack(part) for part in zip(*parts, strict=True)])
    table = np.zeros((len(segments), COLUMNS), dtype=np.int64)
    place = row = 0
    for i, each in enumerate(segments):
        table[i, :5] = each.end, each.request, place, each.begin, row
        place += places_of(each.end)
        row += each.end - each.begin
    arrays[f"{name} segments"] = table.ravel()


def _add(arrays: Arrays, name: str, columns: Sequence[npt.NDArray[np.generic]]) -> None:
    for kind, column in zip(("tokens", "turn", "temperature"), columns, strict=False):
        arrays[f"{name} {kind}"] = column.ravel()


def _turned(there: dict[str, torch.Tensor], name: str) -> Turned:
    temperature = there.get(f"{name} temperature")
    if temperature is not None:
        temperature = temperature.view(torch.float32)
    return Turned(there[f"{name} tokens"], there[f"{name} turn"], temperature)


def _probe(there: dict[str, torch.Tensor], name: str, segments: list[Segment]) -> Probe:
    table = there[f"{name} segments"].view(-1, COLUMNS)
    return Probe(_turned(there, name), table, [each.end for each in segments])
