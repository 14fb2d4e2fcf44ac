"""vLLM sizes the KV cache by a run without one, which must take as much memory as a step does.

The host's code for GPUs runs here as it is; its kernels, which allocate nothing, are left out.
"""

import dataclasses
import types
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.helpers.paged import Batch, Shape, query_start_loc
from vllm_dca.cuda import launches, paged_pass
from vllm_dca.cuda.device import WALK, interpreted
from vllm_dca.engine.impl import DcaImpl
from vllm_dca.engine.step import DcaMetadata, SparseStep
from vllm_dca.method.device import Device
from vllm_dca.method.sparse_operations import SparsePlan
from vllm_dca.method.sparse_planning import dense_rest, sparse_segments
from vllm_dca.method.sparse_prefill import SparsePrefill, SparseSizes
from vllm_dca.method.vertical_slash import Rule

CHUNK_LEN, THRESHOLD = 512, 32768
SHAPE = Shape(
    [],
    chunk_len=CHUNK_LEN,
    local_size=64,
    block_size=16,
    num_kv_heads=1,
    group=2,
    head_size=64,
    rotary_dim=64,
    dtype=torch.bfloat16,
    # Then a prefill turns all queries, to each of the three regions.
    original_max_position_embeddings=100,
)
# (Tokens, of these cached): all but a segment below the threshold, and all of it past.
STEPS = [[(32768, 1024), (33024, 32768)], [(33792, 32768)]]
PROVIDERS = {"triton": WALK, "triton_passes": paged_pass.attention}


class Memory(TorchDispatchMode):
    """What tensors take that are made in it, at most at a time.

    Attributes:
        now: bytes.
        peak: likewise.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        for storage in _storages((args, kwargs)):
            self.known.add(storage)
        made = func(*args, **(kwargs or {}))
        for storage in _storages(made):
            if storage not in self.known:
                self.known.add(storage)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._forget, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return made

    def _forget(self, nbytes: int) -> None:
        self.now -= nbytes


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [
        leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)
    ]


def layer_of(batch: Batch, device: Device, sparse: SparsePrefill | None) -> DcaImpl:
    """As the engine prepares it."""
    shape = batch.shape
    layer = DcaImpl(
        shape.num_kv_heads * shape.group, shape.head_size, shape.scale, shape.num_kv_heads
    )
    layer.prepare(batch.rotation(), device, shape.dtype)
    if sparse is not None:
        sampler: Any = types.SimpleNamespace(watch=None)
        layer.prepare_sparse(Rule(None, None, 0.9, 0), sparse, sampler)
    return layer


def step_of(batch: Batch, device: Device, sparse: SparsePrefill | None) -> DcaMetadata:
    """As the engine plans it."""
    shape = batch.shape
    starts, ends = query_start_loc(shape.lengths).numpy(), [total for total, _ in shape.lengths]
    more = shape.geometry, shape.original_max_position_embeddings
    assert device.prefill is not None
    whole = device.prefill.plan(starts, ends, batch.block_table, shape.block_size, *more)
    step = DcaMetadata(0, int(starts[-1]), None, whole)
    if sparse is not None:
        segments = sparse_segments(starts, ends, CHUNK_LEN, THRESHOLD)
        rest = dense_rest(segments, starts, ends)
        table = batch.block_table[rest.request]
        given = rest.query_start_loc.numpy(), rest.seq_lens.numpy(), table, shape.block_size
        dense = device.prefill.plan(*given, *more) if len(rest.tokens) else None
        step.sparse = SparseStep(
            sparse.plan(SparsePlan(segments, batch.block_table, *more)),
            rest.tokens.int(),
            DcaMetadata(0, len(rest.tokens), None, dense),
            False,
        )
    return step


def taken(run: Callable[..., Any], batch: Batch, step: DcaMetadata | None) -> float:
    """What a layer allocates at most, in tensors of the queries' size."""
    query = torch.cat(batch.queries)
    output = torch.empty_like(query)
    with launches.replaced(lambda *_, **__: None), Memory() as memory:
        run(None, query, None, None, batch.kv_cache, step, output)
    return memory.peak / query.nbytes


@pytest.mark.parametrize("is_sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("provider", PROVIDERS)
def test_profiling_takes_as_much_as_a_step(provider: str, is_sparse: bool) -> None:
    device = interpreted(provider, PROVIDERS[provider])
    sizes = SparseSizes(2, 32768, 40960, CHUNK_LEN, False)
    sparse = device.sparse(sizes) if is_sparse else None
    served = []
    for lengths in STEPS:
        batch = Batch.random(dataclasses.replace(SHAPE, lengths=lengths))
        layer = layer_of(batch, device, sparse)
        served.append(taken(layer.forward, batch, step_of(batch, device, sparse)))
    profiled = taken(layer.forward, batch, None)
    # What is smaller than one such tensor is counted as one.
    assert profiled - 1 < max(served) <= profiled
