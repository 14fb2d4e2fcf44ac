"""What DCA would do with a model, found out without its weights."""

import dataclasses
import json
import tempfile
from typing import Any

from vllm_dca.method.config import DcaSettings
from vllm_dca.method.sparse_cost import Bounds, bounds

# The authors list models of 7 and 13 billion parameters up to 8 times their window
# (https://github.com/HKUNLP/ChunkLlama).
FARTHEST_LISTED = 8


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What `explain` found out.

    Attributes:
        settings: DCA's.
        max_model_len: tokens that a request may have.
        block_size: tokens in a page of the KV cache.
        device_type: of this machine, which chose the block size and the provider.
        dca_layers: names of the layers that DCA attends.
        other_layers: names of those that keep another attention.
        provider: of the prefill's attention; None where that could not be asked.
        token_bytes: KV cache of one more token in DCA's layers, on each rank.
        request_bytes: KV cache of one request of max_model_len tokens, on each rank.
        ranks: of tensor parallelism.
        sparse: what sparse prefill keeps and takes of a prompt of max_model_len tokens; None
            where it is off.
        warnings: for people to read.
    """

    settings: DcaSettings
    max_model_len: int
    block_size: int
    device_type: str
    dca_layers: list[str]
    other_layers: list[str]
    provider: str | None
    token_bytes: int
    request_bytes: int
    ranks: int
    sparse: Bounds | None
    warnings: list[str]


def find_out(model: str, given: dict[str, Any], warnings: list[str]) -> Explanation:
    """Configure vLLM as a start would, and build the model without its weights.

    Args:
        model: a checkpoint's directory or name.
        given: options of `vllm serve`, JSON as text.
        warnings: where the plugin's own arrive.

    Raises:
        ValueError, NotImplementedError, OSError, IncompatibleVllmError: as a start would.
    """
    from vllm_dca.engine import shims

    shims.apply()
    from vllm.config import get_layers_from_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
    from vllm.platforms import current_platform
    from vllm.v1.kv_cache_interface import AttentionSpec

    from vllm_dca.engine.backend import DcaBackend
    from vllm_dca.engine.settings import settings_of

    parsed = {
        name: json.loads(value) if name in ("additional_config", "hf_overrides") else value
        for name, value in given.items()
    }
    args = EngineArgs(model, attention_backend="dca", skip_tokenizer_init=True, **parsed)
    vllm_config = args.create_engine_config()
    unchecked = _build(vllm_config)
    # As an engine does once the model is there.
    current_platform.update_block_size_for_backend(vllm_config)

    layers = get_layers_from_vllm_config(vllm_config, AttentionLayerBase)
    dca = [name for name, layer in layers.items() if layer.get_attn_backend() is DcaBackend]
    ranks = vllm_config.parallel_config.tensor_parallel_size
    specs = {name: layer.get_kv_cache_spec(vllm_config) for name, layer in layers.items()}
    # The model was built as for one rank; vLLM gives each at least one KV head.
    for name, spec in specs.items():
        if isinstance(spec, AttentionSpec):
            heads = max(spec.num_kv_heads // ranks, 1)
            specs[name] = dataclasses.replace(spec, num_kv_heads=heads)
    devices = [layers[name].impl.device for name in dca]
    model_config = vllm_config.model_config
    settings = settings_of(vllm_config)
    return Explanation(
        settings=settings,
        max_model_len=model_config.max_model_len,
        block_size=vllm_config.cache_config.block_size,
        device_type=current_platform.device_type,
        dca_layers=dca,
        other_layers=[name for name in layers if name not in dca],
        provider=devices[0].provider if devices and devices[0] is not None else None,
        token_bytes=sum(specs[name].page_size_bytes // specs[name].block_size for name in dca),
        request_bytes=sum(spec.max_memory_usage_bytes(vllm_config) for spec in specs.values()),
        ranks=ranks,
        sparse=None
        if settings.sparse is None
        else bounds(
            settings.sparse,
            model_config.max_model_len,
            min(
                vllm_config.scheduler_config.max_num_batched_tokens,
                settings.geometry.chunk_len,
            ),
        ),
        warnings=[
            *warnings,
            *unchecked,
            *_length_warnings(settings, model_config.max_model_len),
        ],
    )


def _build(vllm_config: Any) -> list[str]:
    """Build the model on the meta device and install DCA in it, as loading would.

    Returns:
        A warning, if the installation cannot be tried without the weights.

    Raises:
        ValueError, NotImplementedError: a layer cannot be served.
    """
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.distributed import (
        cleanup_dist_env_and_memory,
        ensure_model_parallel_initialized,
        init_distributed_environment,
    )
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    from vllm_dca.engine.backend import DcaBackend

    dtype = vllm_config.model_config.dtype
    with (
        tempfile.TemporaryDirectory() as directory,
        set_current_vllm_config(vllm_config),
    ):
        try:
            init_distributed_environment(1, 0, f"file://{directory}/store", 0, "gloo")
            ensure_model_parallel_initialized(1, 1)
            with torch.device("meta"), set_default_torch_dtype(dtype):
                model = initialize_model(vllm_config)
                DcaBackend.prepare_model(model, vllm_config)
        except NotImplementedError as error:
            if "meta tensor" not in str(error):
                raise
            return [f"Whether DCA can serve each layer shows only at a start ({error})"]
        finally:
            cleanup_dist_env_and_memory()
    return []


def _length_warnings(settings: DcaSettings, max_model_len: int) -> list[str]:
    chunk_len, window = settings.geometry.chunk_len, settings.window
    times = max_model_len / window
    if max_model_len <= chunk_len:
        return [
            f"{max_model_len} tokens are within one chunk, where DCA is ordinary attention; "
            "--max-model-len extends."
        ]
    if max_model_len <= window:
        return [
            f"{max_model_len} tokens are within the trained window, where the model does "
            "without DCA; --max-model-len extends."
        ]
    if times > FARTHEST_LISTED:
        return [
            f"{times:.1f} times the window: DCA's authors list 7B and 13B models up to "
            f"{FARTHEST_LISTED} times, only their 70B farther. Measure before you rely on it."
        ]
    return []
