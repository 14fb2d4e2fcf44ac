"""Of a backend that is always there; see `tests.helpers.model_runner_v2`."""

from typing import Any

from triton.backends.driver import DriverBase


class NoDriver(DriverBase):
    """All that vLLM asks for is that there is one."""

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError

    def get_current_target(self) -> Any:
        raise NotImplementedError

    def get_active_torch_device(self) -> Any:
        raise NotImplementedError

    def get_benchmarker(self) -> Any:
        raise NotImplementedError
