"""vLLM's log while a command runs: errors only, and this plugin's warnings as the command's."""

import contextlib
import logging
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_vllm() -> Iterator[list[str]]:
    """Silence vLLM's log below errors, and collect the warnings of this plugin."""
    logging.disable(logging.WARNING)
    try:
        from vllm.config.logging import LoggingConfig
        from vllm.logger import configure_logging_if_needed

        from vllm_dca.engine.log import logger as plugin

        # Now, as the engine's config would do it later and drop what follows.
        configure_logging_if_needed(LoggingConfig())
    finally:
        logging.disable(logging.NOTSET)
    everything = logging.getLogger("vllm")
    before = [(log, log.level, log.propagate) for log in (everything, plugin)]
    collector = _Collector(logging.WARNING)
    everything.setLevel(logging.ERROR)
    plugin.setLevel(logging.WARNING)
    plugin.propagate = False
    plugin.addHandler(collector)
    try:
        yield collector.messages
    finally:
        plugin.removeHandler(collector)
        for log, level, propagate in before:
            log.setLevel(level)
            log.propagate = propagate


class _Collector(logging.Handler):
    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())
