"""Where the settled settings travel: in vLLM's additional config, to every process."""

from vllm.config import VllmConfig

from vllm_dca.method.config import DcaSettings

# The key of `--additional-config` that holds DCA's options, and then the settings.
OPTIONS = "dca"


def settings_of(vllm_config: VllmConfig) -> DcaSettings:
    """The settings that `vllm_dca.engine.startup.configure` settled, in any process."""
    additional = vllm_config.additional_config
    try:
        return DcaSettings.of_dict(additional[OPTIONS])
    except (KeyError, TypeError) as error:
        raise RuntimeError(
            "DCA runs, but was not configured: the engine's config was not made by "
            "EngineArgs.create_engine_config."
        ) from error
