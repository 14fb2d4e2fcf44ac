"""Imported once by the sweep's fork server: vLLM and transformers, which take long."""

import transformers  # noqa: F401
import vllm.entrypoints.llm
import vllm.v1.worker.cpu_worker  # noqa: F401
