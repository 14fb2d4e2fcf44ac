"""vLLM's metadata builder: a step's batch becomes a decode plan and a prefill plan."""

import functools
import math
from typing import NamedTuple

import torch
from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_dca.engine.block_size import check_pages_split
from vllm_dca.engine.devices import check_one_plan
from vllm_dca.engine.recall import collect
from vllm_dca.engine.settings import settings_of
from vllm_dca.engine.step import DcaMetadata, SparseStep
from vllm_dca.method.planning import upload
from vllm_dca.method.sparse import SparsePlan
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
    # One in so many steps with sparse segments shows what it keeps.
    watched_steps = 16

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        self.settings = settings_of(vllm_config)
        # A draft model reads a token more of each request than the step had, and vLLM does not
        # add it to the lengths that it tells the host.
        self.more = int(all(name.startswith("draft_model.") for name in layer_names))
        self.block_size, self.parts = kv_cache_spec.block_size, 1
        if current_platform.is_cpu():
            # See DcaBackend.get_supported_kernel_block_sizes.
            self.block_size = math.gcd(self.settings.geometry.chunk_len, self.block_size)
            self.parts = kv_cache_spec.block_size // self.block_size
            if self.parts > 1:
                check_pages_split(kv_cache_spec, self.block_size, vllm_config)
        if self.settings.geometry.chunk_len % self.block_size:
            raise ValueError(
                f"DCA's chunk length {self.settings.geometry.chunk_len} is not a multiple of "
                f"the KV cache's block size {self.block_size}, which vLLM changed after "
                "start-up checks. Choose chunk_size - local_size among its multiples."
            )
        layers = vllm_config.compilation_config.static_forward_context
        unprepared = [name for name in layer_names if layers[name].impl.rotation is None]
        if unprepared:
            raise RuntimeError(
                f"DCA was not installed on {unprepared[0]} and {len(unprepared) - 1} other "
                f"layers: the model loader {vllm_config.load_config.load_format!r} does not "
                "build models through BaseModelLoader.create_model. Use --load-format auto."
            )
        check_one_plan({name: layers[name] for name in layer_names}, vllm_config)
        scheduler = vllm_config.scheduler_config
        assert self.reorder_batch_threshold is not None
        # V2 puts requests with drafts first, and says of no draft model's that it prefills.
        verifies = self.reorder_batch_threshold > 1
        self.may_verify_late = verifies and not vllm_config.use_v2_model_runner
        impls = [layers[name].impl for name in layer_names]
        for impl in impls:
            impl.block_size = self.block_size
        group = max(impl.num_heads // impl.num_kv_heads for impl in impls)
        device_of_dca = impls[0].device
        self.prefill = device_of_dca.prefill
        speculated = self.reorder_batch_threshold + self.more
        self.decode_threshold = max(speculated, device_of_dca.decode_rows(group))
        self.plan_decode = device_of_dca.decode_planner(
            self.settings,
            self.block_size,
            max(
                scheduler.max_num_seqs * speculated,
                scheduler.max_num_batched_tokens + scheduler.max_num_seqs * self.more,
                vllm_config.compilation_config.max_cudagraph_capture_size or 0,
            ),
            group,
        )
        # Of a drafter no layer has any.
        ready = [impl.sparse for impl in impls if impl.sparse is not None]
        self.plan_segments = ready[0].plan if ready else None
        self.all_sparse = len(ready) == len(impls)
        # Model Runner V2 then drafts all of a step's tokens in one graph.
        self.supports_draft_decode_metadata_update = not ready
        self.sparse_steps = 0

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
            self._host_lengths(common, slice(num_decodes, num_decodes + num_prefills)),
            self._block_table(common.block_table_tensor),
        )
        split = None
        if self.plan_segments is not None:
            collect()
            split = self._split(requests, num_decodes, num_prefills)
        whole = num_decodes, num_prefills
        if split and self.all_sparse:
            # No layer would take the prefills as they are without segments.
            whole = (0 if self.prefill is None else num_decodes), 0
        metadata = self._plan(requests, *whole, num_decode_tokens)
        metadata.num_actual_tokens = common.num_actual_tokens
        if split:
            metadata.sparse = self._plan_sparse(*split, requests, num_decodes, metadata)
        return metadata

    def _host_lengths(
        self, common: CommonAttentionMetadata, planned: slice
    ) -> torch.Tensor | None:
        """Lengths of all requests; those of what is planned as a prefill are exact.

        vLLM's are exact for prefills, and no copy from a device; where drafts are verified
        they count all of them as accepted. Model Runner V1 may put such a request behind a
        prefill, if layers of another kind count several rows as one: then, and only then, the
        device is waited for.
        """
        prefilling = common.is_prefilling
        if self.may_verify_late and prefilling is not None and not prefilling[planned].all():
            return common.seq_lens.cpu()
        lengths = common.seq_lens_cpu_upper_bound
        return lengths if lengths is None else lengths + self.more

    def _block_table(self, block_table: torch.Tensor) -> torch.Tensor:
        """The block table of the parts that `vllm_dca.method.kv_cache.split_pages` makes."""
        if self.parts == 1:
            return block_table
        parts = torch.arange(self.parts, dtype=block_table.dtype)
        return (block_table[:, :, None] * self.parts + parts).flatten(1)

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

    def _split(
        self, requests: _Requests, num_decodes: int, num_prefills: int
    ) -> tuple[list[Segment], Dense] | None:
        """A step's sparse segments, and its rest; None where there is no segment."""
        assert self.settings.sparse is not None
        if self.prefill is not None and not num_prefills:
            return None
        count = num_decodes + num_prefills
        # Exact for prefills. What takes prefills as it takes decodes runs on the host.
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
        assert self.plan_segments is not None
        there = upload(
            {"tokens": rest.tokens.numpy(), "request": rest.request.numpy()},
            requests.block_table.device,
        )
        of_rest = _Requests(
            rest.query_start_loc,
            rest.seq_lens,
            rest.query_start_loc,
            rest.seq_lens,
            requests.block_table[there["request"]],
        )
        plan = SparsePlan(
            segments,
            requests.block_table,
            self.settings.geometry,
            self.settings.original_max_position_embeddings,
        )
        if self.prefill is not None:
            # Decode rows come first and are in no segment: they are planned already, and again
            # it would be in the same buffers, from lengths that the host does not know.
            decode_tokens = whole.num_decode_tokens
            dense = self._plan_prefills(
                of_rest, num_decodes, len(rest.request) - num_decodes, decode_tokens
            )
            dense.decode = whole.decode
        else:
            dense = self._plan(of_rest, len(rest.request), 0, len(rest.tokens))
        self.sparse_steps += 1
        return SparseStep(
            self.plan_segments(plan),
            there["tokens"],
            dense,
            self.sparse_steps % self.watched_steps == 1 % self.watched_steps,
        )

    def update_draft_decode_metadata(self, metadata: DcaMetadata) -> None:
        """Plan the next of a step's drafts, in the same buffers, by one launch and no host."""
        assert metadata.prefill is None
        assert metadata.sparse is None
        assert metadata.plan_again is not None
        metadata.decode = metadata.plan_again()
