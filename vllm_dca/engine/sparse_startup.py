"""Sparse prefill at start-up: its options, a checkpoint's budgets, and what is said of them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm.config import ModelConfig, VllmConfig
from vllm.model_executor.model_loader.weight_utils import get_sparse_attention_config

from vllm_dca.engine.log import logger
from vllm_dca.engine.model_facts import has_sliding_layers, layer_types
from vllm_dca.engine.settings import OPTIONS
from vllm_dca.method.config import DcaSettings
from vllm_dca.method.geometry import ChunkGeometry
from vllm_dca.method.sparse_config import (
    BUDGETS_KEY,
    CHECKPOINT,
    MODE_KEY,
    OFF,
    SparseSettings,
    resolve_sparse,
)
from vllm_dca.method.sparse_planning import LEAST_ROWS
from vllm_dca.method.vertical_slash import PROBE

IN_CHECKPOINT = "sparse_attention_config"
LAST_ROWS = "sparse_attention_last_q"


def settle_sparse(
    vllm_config: VllmConfig,
    options: Mapping[str, Any],
    checkpoint: Mapping[str, Any] | None,
    geometry: ChunkGeometry,
) -> SparseSettings | None:
    """The settings of sparse prefill; None if it is off.

    Args:
        vllm_config: of the engine.
        options: the user's, validated.
        checkpoint: its dual_chunk_attention_config; vLLM put its budgets there.
        geometry: the chunk sizes.

    Raises:
        ValueError: what was given, what is needed, what would work.
    """
    if options[MODE_KEY] == OFF:
        return None
    most = vllm_config.scheduler_config.max_num_batched_tokens
    if most < LEAST_ROWS:
        raise ValueError(
            f"DCA's sparse prefill needs steps of {LEAST_ROWS} tokens or more, and "
            f"--max-num-batched-tokens is {most}: pass {LEAST_ROWS} or more."
        )
    if geometry.chunk_len < LEAST_ROWS:
        raise ValueError(
            f"DCA's sparse prefill needs chunks of {LEAST_ROWS} tokens or more, but chunk_size "
            f"{geometry.chunk_size} - local_size {geometry.local_size} = {geometry.chunk_len}: "
            f'choose a larger chunk_size, or "{MODE_KEY}": "{OFF}".'
        )
    model = vllm_config.model_config
    return resolve_sparse(
        options,
        checkpoint,
        geometry,
        _budgets(vllm_config, options, checkpoint),
        _attended_layers(model),
        model.hf_text_config.num_attention_heads,
    )


def _budgets(
    vllm_config: VllmConfig, options: Mapping[str, Any], checkpoint: Mapping[str, Any] | None
) -> object:
    if options[MODE_KEY] != CHECKPOINT:
        return None
    if BUDGETS_KEY in options:
        path = Path(options[BUDGETS_KEY])
        try:
            return json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"DCA's {BUDGETS_KEY} {path} cannot be read: {error}.") from error
    if checkpoint is not None:
        return checkpoint.get(IN_CHECKPOINT)
    # vLLM reads it for models with a dual_chunk_attention_config only.
    return get_sparse_attention_config(vllm_config.model_config, vllm_config.load_config)


def _attended_layers(model: ModelConfig) -> list[int]:
    kinds = layer_types(model)
    if not kinds:
        return list(range(model.hf_text_config.num_hidden_layers))
    # "hybrid" of Falcon-H1: each layer attends and keeps a state.
    attended = {"full_attention", "attention", "hybrid"}
    if not has_sliding_layers(model):
        # Such as with --disable-sliding-window.
        attended.add("sliding_attention")
    return [i for i, kind in enumerate(kinds) if kind in attended]


def say_sparse(
    vllm_config: VllmConfig, settings: DcaSettings, checkpoint: Mapping[str, Any] | None
) -> None:
    """A line on what will be done, or on what the checkpoint would have."""
    sparse = settings.sparse
    if sparse is None:
        if checkpoint and checkpoint.get("sparse_attention_enabled"):
            option = json.dumps({OPTIONS: {MODE_KEY: CHECKPOINT}})
            logger.warning(
                "DCA: the checkpoint asks for sparse prefill, which is off: attention runs "
                "dense, same answers or better, more time on long prompts. "
                "--additional-config '%s' switches it on.",
                option,
            )
        return
    logger.info(
        "DCA: sparse prefill %s, where a step has %d tokens or more of a chunk.",
        sparse.described,
        LEAST_ROWS,
    )
    rows = (checkpoint or {}).get(LAST_ROWS, PROBE)
    if sparse.budgets is not None and rows != PROBE:
        logger.warning(
            "DCA: the checkpoint's budgets are for lines that its %s %s rows select. Here the "
            "last %d of a segment do.",
            LAST_ROWS,
            rows,
            PROBE,
        )
    piece = vllm_config.scheduler_config.long_prefill_token_threshold
    if 0 < piece < LEAST_ROWS:
        logger.warning(
            "DCA: --long-prefill-token-threshold %d cuts prompts that share a step into pieces "
            "of fewer than %d tokens, which are dense: only a prompt alone is sparse.",
            piece,
            LEAST_ROWS,
        )
    max_model_len = vllm_config.model_config.max_model_len
    if sparse.threshold + LEAST_ROWS > max_model_len:
        logger.warning(
            "DCA: no prompt of up to %d tokens reaches sparse prefill, which begins at %d. "
            "Choose a smaller sparse_threshold, or a larger --max-model-len.",
            max_model_len,
            sparse.threshold,
        )
