"""What DCA would do with a model, found out without its weights."""

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

from vllm_dca.cli.kinds import LayerKinds, kinds_of
from vllm_dca.method.config import DcaSettings
from vllm_dca.method.sparse_cost import Bounds, bounds

# Up to here the authors' Llama-3-8B keeps the perplexity that it has at its window. Past it, it
# rises, for 70B less (https://github.com/HKUNLP/ChunkLlama).
FARTHEST_LEVEL = 8


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What `explain` found out.

    Attributes:
        settings: DCA's.
        max_model_len: tokens that a request may have.
        block_size: tokens in a page of the KV cache.
        device_type: of this machine, which chose the block size and the provider.
        layers: the model's.
        drafter: the layers of the model that drafts for it; None without one.
        provider: of the prefill's attention; None where that could not be asked.
        token_bytes: KV cache of one more token in DCA's layers, on each rank.
        request_bytes: KV cache of one request of max_model_len tokens, on each rank.
        ranks: of tensor parallelism.
        stages: of pipeline parallelism, which share the layers.
        sparse: what sparse prefill keeps and takes of a prompt of max_model_len tokens; None
            where it is off.
        warnings: for people to read.
    """

    settings: DcaSettings
    max_model_len: int
    block_size: int
    device_type: str
    layers: LayerKinds
    drafter: LayerKinds | None
    provider: str | None
    token_bytes: int
    request_bytes: int
    ranks: int
    stages: int
    sparse: Bounds | None
    warnings: list[str]


def find_out(model: str, given: dict[str, Any], warnings: list[str]) -> Explanation:
    """Configure vLLM as a start would, and build the model without its weights.

    Args:
        model: a checkpoint's directory or name.
        given: the engine's options.
        warnings: where the plugin's own arrive.

    Raises:
        ValueError, NotImplementedError, OSError, ImportError: as a start would.
    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform

    from vllm_dca.engine.settings import settings_of

    own = {"attention_backend": "dca", "skip_tokenizer_init": True}
    vllm_config = EngineArgs(model, **{**given, **own}).create_engine_config()
    built, layers, specs = _layers_of(vllm_config)
    total = vllm_config.model_config.hf_text_config.num_hidden_layers
    of_model, *of_drafter = (
        kinds_of({n: layers[n] for n in each.names if n in layers}, each.unrotated, offset)
        # A drafter's layers are counted on from its model's: no state of these is among them.
        for each, offset in zip(built, [total, *[None] * (len(built) - 1)], strict=True)
    )
    dca = [name for each in (of_model, *of_drafter) for name in each.dca]
    prepared = [layers[name].impl.prepared for name in dca]
    model_config = vllm_config.model_config
    settings = settings_of(vllm_config)
    return Explanation(
        settings=settings,
        max_model_len=model_config.max_model_len,
        block_size=vllm_config.cache_config.block_size,
        device_type=current_platform.device_type,
        layers=of_model,
        drafter=of_drafter[0] if of_drafter else None,
        provider=next((each.device.provider for each in prepared if each is not None), None),
        token_bytes=sum(specs[name].page_size_bytes // specs[name].block_size for name in dca),
        request_bytes=sum(spec.max_memory_usage_bytes(vllm_config) for spec in specs.values()),
        ranks=vllm_config.parallel_config.tensor_parallel_size,
        stages=vllm_config.parallel_config.pipeline_parallel_size,
        sparse=_sparse_bounds(settings, vllm_config),
        warnings=[
            *warnings,
            *(each.unchecked for each in built if each.unchecked),
            *_length_warnings(settings, model_config.max_model_len),
        ],
    )


class _Built(NamedTuple):
    """A model without its weights.

    Attributes:
        names: of its layers.
        unrotated: names of those that rotate nothing.
        unchecked: a warning, if the layers could not be checked without weights.
    """

    names: list[str]
    unrotated: list[str]
    unchecked: str


def _layers_of(vllm_config: Any) -> tuple[list[_Built], dict[str, Any], dict[str, Any]]:
    """The model and its drafter without weights, all layers, and the KV cache of each.

    The layers are of one rank; their caches are as each of the config's ranks has them.
    """
    from vllm.config import get_layers_from_vllm_config
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
    from vllm.platforms import current_platform
    from vllm.v1.kv_cache_interface import AttentionSpec

    with _one_rank(vllm_config):
        built = [_build(*each) for each in _models(vllm_config)]
        # As an engine does once the model is there.
        current_platform.update_block_size_for_backend(vllm_config)
        layers = get_layers_from_vllm_config(vllm_config, AttentionLayerBase)
        # Layers with a state ask how many ranks share it.
        specs = {name: layer.get_kv_cache_spec(vllm_config) for name, layer in layers.items()}
    ranks = vllm_config.parallel_config.tensor_parallel_size
    for name, spec in specs.items():
        if isinstance(spec, AttentionSpec):
            # vLLM gives each rank at least one KV head.
            heads = max(spec.num_kv_heads // ranks, 1)
            specs[name] = dataclasses.replace(spec, num_kv_heads=heads)
    return built, layers, specs


@contextlib.contextmanager
def _one_rank(vllm_config: Any) -> Iterator[None]:
    """What vLLM's models ask for as they are built: a process that is a rank."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import (
        cleanup_dist_env_and_memory,
        ensure_model_parallel_initialized,
        init_distributed_environment,
    )

    # One process is all of one engine: for other engines and nodes torch would wait.
    parallel_config = vllm_config.parallel_config
    parallel_config.data_parallel_size = parallel_config.nnodes = 1
    parallel_config.enable_elastic_ep = False
    with (
        tempfile.TemporaryDirectory() as directory,
        set_current_vllm_config(vllm_config),
    ):
        try:
            init_distributed_environment(1, 0, f"file://{directory}/store", 0, "gloo")
            ensure_model_parallel_initialized(1, 1)
            yield
        finally:
            cleanup_dist_env_and_memory()


def _models(vllm_config: Any) -> list[tuple[Any, Any, str]]:
    """The model, and a drafter that has layers of DCA's, as vLLM's proposers have it.

    Returns:
        For each vLLM's config to build it with, its own, and how its layers' names begin.
    """
    from vllm.config import replace

    from vllm_dca.engine.drafters import DRAFT_MODEL_PREFIX
    from vllm_dca.engine.support import drafter_of

    model = (vllm_config, vllm_config.model_config, "")
    speculative = drafter_of(vllm_config)
    if speculative is None:
        return [model]
    draft, prefix = speculative.draft_model_config, ""
    attention = replace(vllm_config.attention_config, backend=speculative.attention_backend)
    changes = {"attention_config": attention}
    if speculative.kv_cache_dtype is not None:
        changes["cache_config"] = replace(
            vllm_config.cache_config, cache_dtype=speculative.kv_cache_dtype
        )
    if speculative.method == "draft_model":
        prefix = DRAFT_MODEL_PREFIX
        changes |= {"quant_config": None, "model_config": draft}
    return [model, (replace(vllm_config, **changes), draft, prefix)]


def _build(vllm_config: Any, model_config: Any, prefix: str) -> _Built:
    """Build a model on the meta device and prepare its layers for DCA, as loading would.

    Raises:
        ValueError, NotImplementedError: a layer cannot be served.
    """
    import torch
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    from vllm_dca.engine.backend import DcaBackend
    from vllm_dca.engine.rotary_trace import rotation_of

    known = vllm_config.compilation_config.static_forward_context
    before = set(known)
    with torch.device("meta"), set_default_torch_dtype(vllm_config.model_config.dtype):
        model = initialize_model(vllm_config, prefix=prefix, model_config=model_config)
        names = [name for name in known if name not in before]
        try:
            DcaBackend.prepare_model(model, vllm_config)
        except NotImplementedError as error:
            if "meta tensor" not in str(error):
                raise
            unchecked = f"Whether DCA can serve each layer shows only at a start ({error})"
            return _Built(names, [], unchecked)
        unrotated = [
            str(layer.layer_name)
            for name, layer in model.named_modules()
            if getattr(layer, "attn_backend", None) is DcaBackend
            and rotation_of(name, model) is None
        ]
    return _Built(names, unrotated, "")


def _sparse_bounds(settings: DcaSettings, vllm_config: Any) -> Bounds | None:
    if settings.sparse is None:
        return None
    return bounds(
        settings.sparse,
        vllm_config.model_config.max_model_len,
        vllm_config.scheduler_config.max_num_batched_tokens,
        settings.geometry.chunk_len,
    )


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
    if times > FARTHEST_LEVEL:
        return [
            f"{times:.1f} times the window: past {FARTHEST_LEVEL} times perplexity rises for "
            "the models that DCA's authors list. Measure yours before you rely on it."
        ]
    return []
