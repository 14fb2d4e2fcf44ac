"""vLLM's metadata builder: a step's batch becomes a decode plan and a prefill plan."""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_dca.engine.block_size import page_parts
from vllm_dca.engine.devices import check_one_plan
from vllm_dca.engine.drafters import reads_one_token_more
from vllm_dca.engine.impl import DcaImpl
from vllm_dca.engine.settings import settings_of
from vllm_dca.engine.step import DcaMetadata, SparseStep
from vllm_dca.method.planning import upload
from vllm_dca.method.sparse_operations import SparsePlan
from vllm_dca.method.sparse_planning import Dense, Segment, dense_rest, sparse_segments


class _Requests(NamedTuple):
    """Where each request's new tokens begin, and its length: on the device and on the host."""

    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    host_starts: torch.Tensor
    host_lengths: torch.Tensor | None
    block_table: torch.Tensor


class DcaMetadataBuilder(AttentionMetadataBuilder[DcaMetadata]):
    """Plans each step once for all the layers of a KV-cache group.

    A decode plan is made in buffers that stay, on the device, from lengths that are there, so
    that a CUDA graph of any uniform decode batch replays; prefills run between graphs.
    """

    _cudagraph_support = AttentionCGSupport.UNIFORM_BATCH

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        assert self.reorder_batch_threshold is not None
        self.settings = settings_of(vllm_config)
        self.extra_tokens = int(reads_one_token_more(layer_names, vllm_config))
        self.block_size, self.pages_per_block = page_parts(
            kv_cache_spec, self.settings.geometry.chunk_len, vllm_config
        )
        layers = vllm_config.compilation_config.static_forward_context
        _check_prepared({name: layers[name].impl for name in layer_names}, vllm_config)
        check_one_plan({name: layers[name] for name in layer_names}, vllm_config)
        # V2 puts requests with drafts first, and says of no draft model's that it prefills.
        verifies = self.reorder_batch_threshold > 1
        self.may_verify_late = verifies and not vllm_config.use_v2_model_runner
        impls = [layers[name].impl for name in layer_names]
        for impl in impls:
            impl.block_size = self.block_size
        group = max(impl.num_heads // impl.num_kv_heads for impl in impls)
        device_of_dca = impls[0].prepared.device
        self.prefill = device_of_dca.prefill
        speculated = self.reorder_batch_threshold + self.extra_tokens
        self.decode_threshold = max(speculated, device_of_dca.decode_rows(group))
        scheduler = vllm_config.scheduler_config
        self.plan_decode = device_of_dca.decode_planner(
            self.settings,
            self.block_size,
            max(
                scheduler.max_num_seqs * speculated,
                scheduler.max_num_batched_tokens + scheduler.max_num_seqs * self.extra_tokens,
                vllm_config.compilation_config.max_cudagraph_capture_size or 0,
            ),
            group,
        )
        # A drafter's layers are always dense.
        sparse = [impl.sparse for impl in impls if impl.sparse is not None]
        self.sparse = sparse[0] if sparse else None
        self.all_sparse = len(sparse) == len(impls)
        # Model Runner V2 then drafts all of a step's tokens in one graph.
        self.supports_draft_decode_metadata_update = not sparse

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> DcaMetadata:
        """Split the batch into decode rows and prefills, and plan both."""
        common = common_attn_metadata
        if common.causal is not True:
            raise NotImplementedError("DCA attends causally only.")
        num_decodes, num_prefills, num_decode_tokens, _ = split_decodes_and_prefills(
            common, decode_threshold=self.decode_threshold
        )
        requests = _Requests(
            common.query_start_loc,
            common.seq_lens,
            common.query_start_loc_cpu,
            host_lengths(
                common,
                slice(num_decodes, num_decodes + num_prefills),
                self.extra_tokens,
                self.may_verify_late,
            ),
            self._block_table(common.block_table_tensor),
        )
        found = None
        if self.sparse is not None:
            self.sparse.sampler.collect()
            found = self.split(requests, num_decodes, num_prefills)
        whole = num_decodes, num_prefills
        if found and self.all_sparse:
            # Every layer prefills sparsely in this step: a dense plan of prefills is not used.
            whole = (0 if self.prefill is None else num_decodes), 0
        metadata = self._plan(requests, *whole, num_decode_tokens)
        metadata.num_actual_tokens = common.num_actual_tokens
        if found:
            metadata.sparse = self._plan_sparse(*found, requests, num_decodes, metadata)
        return metadata

    def _block_table(self, block_table: torch.Tensor) -> torch.Tensor:
        """The block table of the parts that `vllm_dca.method.kv_cache.split_pages` makes."""
        if self.pages_per_block == 1:
            return block_table
        parts = torch.arange(self.pages_per_block, dtype=block_table.dtype)
        return (block_table[:, :, None] * self.pages_per_block + parts).flatten(1)

    def _plan(
        self, requests: _Requests, num_decodes: int, num_prefills: int, num_decode_tokens: int
    ) -> DcaMetadata:
        """All of it dense."""
        metadata = self._plan_prefills(requests, num_decodes, num_prefills, num_decode_tokens)
        if num_decodes:
            metadata.plan_again = functools.partial(
                self.plan_decode,
                requests.query_start_loc[: num_decodes + 1],
                requests.seq_lens[:num_decodes],
                requests.block_table[:num_decodes],
                num_decode_tokens,
                int(requests.host_starts[: num_decodes + 1].diff().max()),
            )
            metadata.decode = metadata.plan_again()
        return metadata

    def _plan_prefills(
        self, requests: _Requests, num_decodes: int, num_prefills: int, num_decode_tokens: int
    ) -> DcaMetadata:
        prefill = None
        num_tokens = num_decode_tokens
        if num_prefills:
            rows = slice(num_decodes, num_decodes + num_prefills)
            assert requests.host_lengths is not None
            query_start_loc = requests.host_starts[num_decodes : rows.stop + 1].numpy()
            num_tokens = int(query_start_loc[-1])
            assert self.prefill is not None
            prefill = self.prefill.plan(
                query_start_loc - num_decode_tokens,
                requests.host_lengths[rows].numpy(),
                requests.block_table[rows],
                self.block_size,
                self.settings.geometry,
                self.settings.original_max_position_embeddings,
            )
        return DcaMetadata(num_decode_tokens, num_tokens, None, prefill)

    def split(
        self, requests: _Requests, num_decodes: int, num_prefills: int
    ) -> tuple[list[Segment], Dense] | None:
        """A step's sparse segments, and its dense rest; None where there is no segment."""
        assert self.settings.sparse is not None
        if self.prefill is not None and not num_prefills:
            return None
        count = num_decodes + num_prefills
        # Exact for prefills. Without a plan of prefills (the CPU's kernel) all are on the host.
        lengths = requests.host_lengths if self.prefill is not None else requests.seq_lens
        assert lengths is not None
        starts, ends = requests.host_starts[: count + 1].numpy(), lengths[:count].numpy()
        chunk_len, threshold = self.settings.geometry.chunk_len, self.settings.sparse.threshold
        segments = sparse_segments(starts, ends, chunk_len, threshold)
        return (segments, dense_rest(segments, starts, ends)) if segments else None

    def _plan_sparse(
        self,
        segments: list[Segment],
        rest: Dense,
        requests: _Requests,
        num_decodes: int,
        whole: DcaMetadata,
    ) -> SparseStep:
        """What sparse layers do instead of `whole`."""
        assert self.sparse is not None
        # Decode rows come first and are in no segment. On a GPU they are planned already, and
        # again it would be in the same buffers, from lengths that the host does not know.
        planned = 0 if self.prefill is None else num_decodes
        [there] = upload(
            [{"tokens": rest.tokens.numpy(), "request": rest.request[planned:].numpy()}],
            requests.block_table.device,
        )
        plan = SparsePlan(
            segments,
            requests.block_table,
            self.settings.geometry,
            self.settings.original_max_position_embeddings,
        )
        pieces = _Requests(
            rest.query_start_loc,
            rest.seq_lens,
            rest.query_start_loc[planned:],
            rest.seq_lens[planned:],
            requests.block_table[there["request"]],
        )
        count = len(rest.request) - planned
        if self.prefill is None:
            dense = self._plan(pieces, count, 0, len(rest.tokens))
        else:
            dense = self._plan_prefills(pieces, 0, count, whole.num_decode_tokens)
            dense.decode = whole.decode
        return SparseStep(
            self.sparse.prefill.plan(plan),
            there["tokens"],
            dense,
            self.sparse.sampler.takes_next_step(),
        )

    def update_draft_decode_metadata(self, metadata: DcaMetadata) -> None:
        """Plan the next of a step's drafts, in the same buffers, by one launch and no host."""
        assert metadata.prefill is None
        assert metadata.sparse is None
        assert metadata.plan_again is not None
        metadata.decode = metadata.plan_again()


def host_lengths(
    common: CommonAttentionMetadata, planned: slice, extra_tokens: int, may_verify_late: bool
) -> torch.Tensor | None:
    """Lengths of all requests on the host; those of what is planned as a prefill are exact.

    vLLM's are exact for prefills, and no copy from a device; where drafts are verified they
    count all of them as accepted. Model Runner V1 may put such a request behind a prefill, if
    layers of another kind count several rows as one: then, and only then, the device is waited
    for.

    Args:
        common: of the step.
        planned: the requests that are prefills.
        extra_tokens: of each request, which vLLM does not count on the host.
        may_verify_late: whether there may be drafts among these.
    """
    prefilling = common.is_prefilling
    if may_verify_late and prefilling is not None and not prefilling[planned].all():
        return common.seq_lens.cpu()
    lengths = common.seq_lens_cpu_upper_bound
    return lengths if lengths is None else lengths + extra_tokens


def _check_prepared(impls: Mapping[str, DcaImpl], vllm_config: VllmConfig) -> None:
    """Raise a RuntimeError if a model was built without DCA being told."""
    unprepared = [name for name, impl in impls.items() if impl.prepared is None]
    if unprepared:
        raise RuntimeError(
            f"DCA was not installed on {unprepared[0]} and {len(unprepared) - 1} other "
            f"layers: the model loader {vllm_config.load_config.load_format!r} does not "
            "build models through BaseModelLoader.create_model. Use --load-format auto."
        )
