"""What a person types: `vllm-dca explain`, `calibrate` and `doctor`."""

from vllm_dca.cli.main import app

__all__ = ["app"]
