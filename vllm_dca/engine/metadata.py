"""vLLM's metadata builder: a step's batch becomes a decode plan and a prefill plan."""

import sys
from dataclasses import dataclass
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_dca.engine.settings import settings_of
from vllm_dca.engine.support import DRAFTERS_ON_THE_CPU
from vllm_dca.method.planning import PrefillPlan, plan_prefill


@dataclass
class DcaMetadata:
    """A step's batch, decode rows first; either part may be absent."""

    num_decode_tokens: int
    num_actual_tokens: int
    decode: Any
    prefill: PrefillPlan | None


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
        self.settings = settings_of(vllm_config)
        speculative = vllm_config.speculative_config
        self.host_lengths_are_short = (
            speculative is not None and speculative.method in DRAFTERS_ON_THE_CPU
        )
        self.block_size = kv_cache_spec.block_size
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
        scheduler = vllm_config.scheduler_config
        assert self.reorder_batch_threshold is not None
        device_of_dca = layers[layer_names[0]].impl.device
        self.plan_decode = device_of_dca.decode_planner(
            self.settings,
            self.block_size,
            max(
                scheduler.max_num_seqs * self.reorder_batch_threshold,
                vllm_config.compilation_config.max_cudagraph_capture_size or 0,
            ),
            kv_cache_spec.num_kv_heads,
        )
        self.decode_threshold = self.reorder_batch_threshold
        if device_of_dca.prefill is None:
            self.decode_threshold = sys.maxsize

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
        geometry = self.settings.geometry
        length = self.settings.original_max_position_embeddings
        decode = prefill = None
        if num_decodes:
            decode = self.plan_decode(
                common.query_start_loc[: num_decodes + 1],
                common.seq_lens[:num_decodes],
                common.block_table_tensor[:num_decodes],
                num_decode_tokens,
            )
        if num_prefills:
            requests = slice(num_decodes, num_decodes + num_prefills)
            # Exact for prefills, and no copy from a device.
            seq_lens = common.seq_lens_cpu_upper_bound
            if self.host_lengths_are_short:
                seq_lens = common.seq_lens
            assert seq_lens is not None
            query_start_loc = common.query_start_loc_cpu[num_decodes:].numpy()
            prefill = plan_prefill(
                query_start_loc[: num_prefills + 1] - num_decode_tokens,
                seq_lens[requests].numpy(),
                common.block_table_tensor[requests],
                self.block_size,
                geometry,
                length,
            )
        return DcaMetadata(num_decode_tokens, common.num_actual_tokens, decode, prefill)
