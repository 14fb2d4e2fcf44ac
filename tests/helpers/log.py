"""What the plugin logs in this process."""

import contextlib
import logging
from collections.abc import Iterator


@contextlib.contextmanager
def collected() -> Iterator[list[str]]:
    """Its messages, as they come."""
    from vllm.config.logging import LoggingConfig
    from vllm.logger import configure_logging_if_needed

    # Else the first engine would, and take away what was added.
    configure_logging_if_needed(LoggingConfig())

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    messages: list[str] = []
    collector = Collector()
    logger = logging.getLogger("vllm.plugins.dca")
    logger.addHandler(collector)
    try:
        yield messages
    finally:
        logger.removeHandler(collector)
