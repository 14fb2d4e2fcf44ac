"""KV caches that tests read on the machine that they run on."""

import torch

from tests.helpers import paged


def fp8_dtypes() -> list[torch.dtype]:
    """Triton has no float8_e4m3fn before compute capability 8.9."""
    on_cpu = paged.DEVICE.type == "cpu"
    capable = on_cpu or torch.cuda.get_device_capability() >= (8, 9)
    return [torch.float8_e5m2, *[torch.float8_e4m3fn] * capable]
