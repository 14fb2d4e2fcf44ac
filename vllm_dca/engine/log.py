"""Where this plugin logs."""

from vllm.logger import init_logger

# vLLM's logger is set up for its own package only.
logger = init_logger("vllm.plugins.dca")
