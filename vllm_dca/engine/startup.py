"""What is checked and settled once, in the process that the user started."""

import dataclasses
from typing import Any

import torch
from vllm.config import ModelConfig, VllmConfig
from vllm.v1.kv_cache_interface import KVCacheSpecKind

from vllm_dca.engine.block_size import block_size_of
from vllm_dca.engine.devices import current_processor
from vllm_dca.engine.log import logger
from vllm_dca.engine.model_facts import has_sliding_layers
from vllm_dca.engine.refusals import refusals
from vllm_dca.engine.settings import OPTIONS
from vllm_dca.engine.shims import names_dca
from vllm_dca.engine.sparse_startup import say_sparse, settle_sparse
from vllm_dca.engine.support import PROVED_MODELS, drafter_of
from vllm_dca.engine.window import default_length, eagle_window, own_window
from vllm_dca.method.config import DcaSettings, resolve_settings, validate_options

CHECKPOINT_CONFIG = "dual_chunk_attention_config"


def configure(vllm_config: VllmConfig) -> None:
    """Check that DCA can serve this configuration and settle the chunk sizes.

    The settings go into `additional_config`, which travels to every process and is hashed
    into the compile cache's key. The checkpoint's own config is taken away: vLLM's models
    still pass it to backends and rotary embeddings that no longer know it.

    Raises:
        ValueError, NotImplementedError: what was given, what is needed, what would work.
    """
    if not names_dca(vllm_config.attention_config):
        raise ValueError(
            "The speculative config's attention_backend DCA needs --attention-backend dca too: "
            "a drafter has its model's chunks. Pass it, which is enough for both, or leave the "
            "speculative config's out."
        )
    _check_supported(vllm_config)
    model_config = vllm_config.model_config
    _disable_embeddings(vllm_config)
    _restore_length(vllm_config)
    drafter = drafter_of(vllm_config)
    if has_sliding_layers(model_config) or (
        drafter is not None and has_sliding_layers(drafter.draft_model_config)
    ):
        _keep_sliding_layers(vllm_config)
    options = validate_options(vllm_config.additional_config.get(OPTIONS, {}))
    checkpoint = _take_checkpoint_config(model_config)
    settings = resolve_settings(
        options,
        checkpoint,
        own_window(model_config, model_config.max_model_len),
        block_size_of(vllm_config),
    )
    sparse = settle_sparse(vllm_config, options, checkpoint, settings.geometry)
    settings = dataclasses.replace(settings, sparse=sparse)
    window = settings.window
    # A new dictionary: the old one is the user's EngineArgs, which may be used again.
    vllm_config.additional_config = {
        **vllm_config.additional_config,
        OPTIONS: settings.to_dict(),
    }

    _extend_drafter(vllm_config, settings)

    geometry = settings.geometry
    logger.info(
        "DCA: chunk_size %d, local_size %d (chunks of %d tokens), %s, %s; up to %d tokens, "
        "%.1f times the model's %d.",
        settings.chunk_size,
        settings.local_size,
        geometry.chunk_len,
        settings.source,
        "no attention temperature"
        if settings.original_max_position_embeddings is None
        else f"attention temperature from {settings.original_max_position_embeddings} tokens",
        model_config.max_model_len,
        model_config.max_model_len / window,
        window,
    )
    _warn_of_slow_dtype(model_config.dtype)
    _warn_of_shared_keys(vllm_config, settings)
    if settings.chunk_size > window:
        logger.warning(
            "DCA: chunk_size %d is over the model's window of %d tokens, so queries take "
            "positions it was not trained on. Choose at most %d unless you mean it.",
            settings.chunk_size,
            window,
            window,
        )
    say_sparse(vllm_config, settings, checkpoint)


def _check_supported(vllm_config: VllmConfig) -> None:
    refused = refusals(vllm_config)
    if refused:
        raise NotImplementedError(
            f"--attention-backend dca does not support {', '.join(refused)}. "
            "Leave out what was named, or use another attention backend."
        )
    kind = vllm_config.model_config.hf_text_config.model_type
    if kind not in PROVED_MODELS:
        logger.warning(
            "DCA: %s models are not among the %d whose answers were checked. It looks as "
            "if DCA can serve this one; check what it answers past its window.",
            kind,
            len(PROVED_MODELS),
        )


def _disable_embeddings(vllm_config: VllmConfig) -> None:
    """Refuse embeddings of images, which vLLM accepts wherever keys are received.

    Requests are checked against this very object, in this process and in every other one that
    accepts them. The engine's process does this again; by then it only costs memory.
    """
    model_config = vllm_config.model_config
    multimodal = model_config.multimodal_config
    if not model_config.uses_mrope or multimodal is None or not multimodal.enable_mm_embeds:
        return
    multimodal.enable_mm_embeds = multimodal.allow_missing_mm_embeddings = False
    # Else the engine's process would look for a cache in shared memory that was never made.
    multimodal.mm_processor_cache_gb = 0
    logger.warning(
        "DCA: vLLM accepts embeddings of images and videos where %s receives keys. With M-RoPE "
        "DCA serves text only, so requests with such embeddings are refused.",
        vllm_config.kv_transfer_config.kv_connector,
    )


def _warn_of_slow_dtype(dtype: torch.dtype) -> None:
    """A laptop's processor often multiplies in fp32 only, and checkpoints are in bf16."""
    processor = current_processor()
    if processor is None or dtype in (torch.float32, processor.dtype):
        return
    name, faster = (str(each).removeprefix("torch.") for each in (dtype, processor.dtype))
    logger.warning(
        "DCA: this processor (%s) has no instruction that multiplies %s, so that vLLM's matrix "
        "products take several times as long as in %s. --dtype %s is faster here.",
        processor.instructions,
        name,
        faster,
        faster,
    )


def _warn_of_shared_keys(vllm_config: VllmConfig, settings: DcaSettings) -> None:
    """A store tells keys apart by model, tokens and layout, and not by how they were rotated.

    Nothing of vLLM's configuration that reaches every connector's names could say it:
    `additional_config` is in none of them, and a salt belongs to a request.
    """
    transfer = vllm_config.kv_transfer_config
    if transfer is None or transfer.kv_connector is None:
        return
    logger.warning(
        "DCA: %s stores keys as DCA rotated them, and their names do not tell the chunk sizes. "
        "Every server of this store must run DCA with this model, chunk_size %d, local_size %d "
        "and original_max_position_embeddings %s%s. Give other servers a store of their own.",
        transfer.kv_connector,
        settings.chunk_size,
        settings.local_size,
        "null"
        if settings.original_max_position_embeddings is None
        else settings.original_max_position_embeddings,
        # Past its threshold, keys come from what sparse layers answered.
        "" if settings.sparse is None else ", and with these options of sparse prefill",
    )


def _keep_sliding_layers(vllm_config: VllmConfig) -> None:
    """Full attention is DCA's; layers with a window keep a backend of vLLM's choice."""
    attention = vllm_config.attention_config
    vllm_config.attention_config = dataclasses.replace(
        attention,
        backend=None,
        backend_per_kind={KVCacheSpecKind.FULL_ATTENTION.value: attention.backend},
    )


def _restore_length(vllm_config: VllmConfig) -> None:
    """With Model Runner V2, vLLM 0.33 lowers the model's max_model_len to its drafter's. DCA
    extends the drafter to the model's length, so the model gets its own back.
    """
    if drafter_of(vllm_config) is None or not vllm_config.use_v2_model_runner:
        return
    model_config = vllm_config.model_config
    length = model_config.original_max_model_len
    if length is None or length < 0:  # by auto
        length = default_length(model_config)
    model_config.max_model_len = max(model_config.max_model_len, length)


def _extend_drafter(vllm_config: VllmConfig, settings: DcaSettings) -> None:
    """A drafter's attention layers are DCA's too: it drafts as far as the model answers, or
    under Model Runner V1 as the user said.
    """
    speculative = drafter_of(vllm_config)
    if speculative is None:
        return
    model_config, draft = vllm_config.model_config, speculative.draft_model_config
    _take_checkpoint_config(draft)
    # vLLM would choose one anew.
    if speculative.attention_backend is None:
        speculative.attention_backend = vllm_config.attention_config.backend
    if speculative.max_model_len is not None:
        if not vllm_config.use_v2_model_runner:
            return  # vLLM has seen to it that this is within the drafter's window.
        if speculative.max_model_len < model_config.max_model_len:
            logger.warning(
                "DCA: under vLLM's Model Runner V2 drafting does not stop at the speculative "
                "config's max_model_len of %d tokens: the drafter drafts as far as the model "
                "answers, %d tokens. Leave it out, or take V1, which stops there: "
                "VLLM_USE_V2_MODEL_RUNNER=0.",
                speculative.max_model_len,
                model_config.max_model_len,
            )
    draft.max_model_len = model_config.max_model_len
    is_eagle = speculative.method in ("eagle", "eagle3")
    window = (eagle_window if is_eagle else own_window)(draft, draft.max_model_len)
    if settings.chunk_size > window:
        logger.warning(
            "DCA: chunk_size %d is over the drafter's window of %d tokens, so few of its "
            "drafts will be accepted. Choose at most %d.",
            settings.chunk_size,
            window,
            window,
        )


def _take_checkpoint_config(model_config: ModelConfig) -> dict[str, Any] | None:
    """Remove and return the checkpoint's config; null would not do, vLLM tests hasattr."""
    checkpoint = None
    for hf_config in (model_config.hf_config, model_config.hf_text_config):
        if hasattr(hf_config, CHECKPOINT_CONFIG):
            checkpoint = getattr(hf_config, CHECKPOINT_CONFIG)
            delattr(hf_config, CHECKPOINT_CONFIG)
    return checkpoint
