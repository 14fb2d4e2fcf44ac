"""Where the metrics were; for installations that name them, until version 0.2."""

raise ImportError(
    "vllm_dca.metrics is vllm_dca.engine.metrics now. This installation's entry points are "
    "those of an older version: install vllm-dca again."
)
