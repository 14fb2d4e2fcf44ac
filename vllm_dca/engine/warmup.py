"""A GPU's kernels compiled before the server says that it is ready.

vLLM keeps a registry of kernels to compile, and runs it in each worker once the KV cache is
there (`--kernel-config '{"enable_jit_warmup": false}'` leaves it out). It does not on a CPU.
"""

import dataclasses

import torch
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.warmup.jit_warmup import VllmJitKernel

from vllm_dca.engine.impl import DcaImpl
from vllm_dca.engine.settings import settings_of
from vllm_dca.engine.step import DcaMetadata, SparseStep
from vllm_dca.method.config import DcaSettings
from vllm_dca.method.geometry import ChunkGeometry
from vllm_dca.method.sparse_operations import SparsePlan
from vllm_dca.method.sparse_planning import LEAST_ROWS, Segment

# Tokens a chunk at least, so that a segment has more queries than `QUERIES`.
CHUNK_LEN = 320
# Each pass of flash-attention 4 is compiled for up to so many queries of a segment that share a
# KV head, and for more.
QUERIES = (128, 256)


@dataclasses.dataclass(frozen=True)
class LayerKernels:
    """What a layer's kernels are compiled for.

    Attributes:
        settings: the chunk sizes; some kernels are compiled for them.
        num_heads: query heads.
        num_kv_heads: heads of the KV cache.
        dtype: of the queries.
        cache_dtype: of the KV cache.
        cache_shape: of a page.
        cache_strides: of the KV cache.
        rotary_dim: entries of a head that are rotated.
        is_neox: how they are paired.
        soft_cap: of the scores.
        has_sinks: whether each softmax has one more logit.
        is_sparse: whether it prefills sparsely too.
        layer: one of those that have all of this in common.
    """

    settings: DcaSettings
    num_heads: int
    num_kv_heads: int
    dtype: torch.dtype
    cache_dtype: torch.dtype
    cache_shape: tuple[int, ...]
    cache_strides: tuple[int, ...]
    rotary_dim: int
    is_neox: bool
    soft_cap: float | None
    has_sinks: bool
    is_sparse: bool
    layer: Attention | None = dataclasses.field(compare=False)


class DcaKernels(VllmJitKernel[LayerKernels]):
    """All kernels of all DCA layers, the model's and a drafter's, once a process."""

    CompileKey = LayerKernels

    def __init__(self) -> None:
        super().__init__()
        self.compiled: set[LayerKernels] = set()

    def get_warmup_keys(self, vllm_config: VllmConfig) -> list[LayerKernels]:
        """A key for each kind of layer with a prefill; the CPU's kernel is compiled before."""
        settings = settings_of(vllm_config)
        layers = vllm_config.compilation_config.static_forward_context.values()
        keys = []
        for layer in layers:
            impl = getattr(layer, "impl", None)
            if not isinstance(impl, DcaImpl) or impl.prepared is None:
                continue
            rotation, device, cache_dtype = impl.prepared
            if device.prefill is None or not layer.kv_cache.numel():
                continue
            keys.append(
                LayerKernels(
                    settings,
                    impl.num_heads,
                    impl.num_kv_heads,
                    vllm_config.model_config.dtype,
                    cache_dtype,
                    tuple(layer.kv_cache.shape[1:]),
                    layer.kv_cache.stride(),
                    rotation.cos_sin.shape[-1],
                    rotation.is_neox,
                    impl.soft_cap,
                    impl.sinks is not None,
                    impl.sparse is not None,
                    layer,
                )
            )
        return keys

    @torch.inference_mode()
    def compile(self, compile_key: LayerKernels) -> None:
        """Let a layer answer prompts of one to three chunks, and decode rows.

        The prompts lie in the KV cache's first page, again and again: it is read, never
        written, and what comes out is thrown away.
        """
        if compile_key in self.compiled:
            return
        self.compiled.add(dataclasses.replace(compile_key, layer=None))
        settings, layer = compile_key.settings, compile_key.layer
        assert layer is not None
        device_of_dca = layer.impl.prepared.device
        device, page_size = layer.kv_cache.device, layer.kv_cache.shape[2]
        # Turns by more positions than the layer's table has rows would be read past its end.
        chunk_len = min(settings.geometry.chunk_len, -(-CHUNK_LEN // page_size) * page_size)
        group = compile_key.num_heads // compile_key.num_kv_heads
        for new, length in prompts(chunk_len, group, compile_key.has_sinks):
            table = torch.zeros(1, -(-length // page_size), dtype=torch.int32, device=device)
            plan = device_of_dca.prefill.plan(
                [0, new],
                [length],
                table,
                page_size,
                ChunkGeometry(chunk_len + 1, 1),
                settings.original_max_position_embeddings,
            )
            _attend(compile_key, DcaMetadata(0, new, None, plan))
        if compile_key.is_sparse:
            _attend_sparsely(compile_key)
        powers = range(device_of_dca.decode_rows(group).bit_length() + 1)
        planner = device_of_dca.decode_planner(settings, page_size, 1 << powers[-1], group)
        # As many rows of a request stand in one tile as are speculated, or as fit.
        for rows in (1 << power for power in powers):
            starts, lengths, table = (
                torch.tensor(numbers, dtype=torch.int32, device=device)
                for numbers in ([0, rows], [1], [[0]])
            )
            plan = planner(starts, lengths, table, rows)
            _attend(compile_key, DcaMetadata(rows, rows, plan, None))


def prompts(chunk_len: int, group: int, has_sinks: bool) -> list[tuple[int, int]]:
    """New tokens and length of each prompt to answer, so that every kind of pass is met.

    Args:
        chunk_len: s.
        group: query heads that share a KV head.
        has_sinks: of the layer.
    """
    # All passes' kernels are met in two and three; one chunk is merged with sinks only.
    whole = [chunks * chunk_len for chunks in range(1 if has_sinks else 2, 4)]
    few = [1, *(most // group + 1 for most in QUERIES)]
    return [(each, each) for each in whole] + [(each, 2 * chunk_len + each) for each in few]


def _attend_sparsely(key: LayerKernels) -> None:
    """A step of one segment, sampled."""
    assert key.layer is not None
    impl, cache = key.layer.impl, key.layer.kv_cache
    plan = SparsePlan(
        [Segment(0, 0, LEAST_ROWS, 0)],
        torch.zeros(1, LEAST_ROWS, dtype=torch.int32, device=cache.device),
        key.settings.geometry,
        key.settings.original_max_position_embeddings,
    )
    none = torch.empty(0, dtype=torch.int32, device=cache.device)
    sparse = impl.sparse
    step = SparseStep(sparse.prefill.plan(plan), none, DcaMetadata(0, 0, None, None), True)
    watch, sparse.watch = sparse.watch, lambda attended: attended.kept(attended.lines)
    try:
        _attend(key, DcaMetadata(0, LEAST_ROWS, None, None, step))
    finally:
        sparse.watch = watch


def _attend(key: LayerKernels, metadata: DcaMetadata) -> None:
    """With queries on their own, and as a part of what a projection makes of keys too."""
    assert key.layer is not None
    cache = key.layer.kv_cache
    for others in (0, 2 * key.num_kv_heads):
        projected = torch.zeros(
            metadata.num_actual_tokens,
            key.num_heads + others,
            key.layer.impl.head_size,
            dtype=key.dtype,
            device=cache.device,
        )
        query = projected[:, : key.num_heads]
        output = torch.empty(query.shape, dtype=key.dtype, device=cache.device)
        key.layer.impl.forward(key.layer, query, query, query, cache, metadata, output)


KERNELS = DcaKernels()
