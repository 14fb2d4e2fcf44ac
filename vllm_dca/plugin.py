"""The entry point that vLLM calls in each of its processes."""


def register() -> None:
    """Make `--attention-backend dca` available; nothing else changes until it is selected.

    On a vLLM that the plugin was not written for it stays unavailable, so that asking for it
    is vLLM's error for an unknown backend, never another attention in its place.
    """
    from vllm_dca.engine import shims
    from vllm_dca.engine.log import logger

    try:
        shims.apply()
    except shims.IncompatibleVllmError as error:
        logger.warning(
            "The attention backend DCA is not available: %s. Install a vLLM that vllm-dca "
            "supports, or a vllm-dca that supports this vLLM.",
            error,
        )
