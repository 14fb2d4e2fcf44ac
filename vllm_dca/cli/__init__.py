"""What a person types: `vllm-dca explain` and `vllm-dca doctor`."""

from vllm_dca.cli.main import app

__all__ = ["app"]
