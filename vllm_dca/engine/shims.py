"""Shims over vLLM: what DCA needs that vLLM has no extension point for yet.

Each shim is one function that names its target, why it is needed and what makes it step
aside. Its twin is a diff in patches/ that adds the missing extension point to vLLM.
"""

import copyreg
import functools
import inspect
import pickle
import pkgutil
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import vllm
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

if TYPE_CHECKING:
    from vllm.config import AttentionConfig
    from vllm.engine.arg_utils import EngineArgs

# The minors that the tests cover, and how; pyproject.toml says the same.
TESTED_VLLM = {
    "0.32": "with its CPU build",
    "0.33": "in its Python code only, on the compiled operators of 0.32's CPU build",
}

NAME = "DCA"
CLASS_PATH = "vllm_dca.engine.backend.DcaBackend"


class IncompatibleVllmError(RuntimeError):
    """This vLLM is not one that the shims were written for."""


def how_tested() -> str | None:
    """How the installed vLLM's minor was tested; None if it was not."""
    return TESTED_VLLM.get(".".join(vllm.__version__.split(".")[:2]))


@functools.cache
def apply() -> list[str]:
    """Register the backend and apply every shim that this vLLM still needs; once a process.

    Returns:
        Names of the shims in force.

    Raises:
        IncompatibleVllmError: untested minor, or a target has changed. Nothing is applied.
    """
    if how_tested() is None:
        raise IncompatibleVllmError(
            f"vLLM {vllm.__version__} is installed; tested are {', '.join(TESTED_VLLM)}"
        )
    needed = [shim for shim in SHIMS if shim.is_needed()]
    for shim in needed:
        if how := shim.moved():
            raise IncompatibleVllmError(how)
    # With patches/0001, vLLM registers it when it unpickles a config, before the plugin loads.
    if NAME not in AttentionBackendEnum.__members__:
        register_backend(NAME, CLASS_PATH)
    for shim in needed:
        shim.apply()
    return [shim.name for shim in needed]


def names_dca(config: "AttentionConfig", *others: Any) -> bool:
    """Whether DCA is the backend of all layers, of one kind of layers, or one of `others`."""
    selected = (config.backend, *config.backend_per_kind.values(), *others)
    return any(str(getattr(each, "name", each)).upper() == NAME for each in selected)


def selects_dca(args: "EngineArgs") -> bool:
    """Whether the user asked for DCA."""
    return names_dca(args.attention_config, args.attention_backend)


def pickle_by_name() -> None:
    """Target: pickling of AttentionBackendEnum.

    A member registered at run time pickles by value, and is unpickled in a spawned process
    before plugins are loaded there: "is not a valid AttentionBackendEnum".
    Until: patches/0001.
    """
    copyreg.pickle(AttentionBackendEnum, _reduce)


def _reduce(member: AttentionBackendEnum) -> str | tuple[Any, ...]:
    if member.name == NAME:
        return _restore, ()
    # As without the shim: Python 3.11's own versions differ in how.
    return member.__reduce_ex__(pickle.HIGHEST_PROTOCOL)


def _restore() -> AttentionBackendEnum:
    """Unpickle the DCA member, registering it first where the plugin is not loaded yet."""
    apply()
    return AttentionBackendEnum[NAME]


def select_on_cpu() -> None:
    """Target: CpuPlatform.get_attn_backend_cls.

    It ignores the selected backend and returns its own.
    Until: patches/0002.
    """
    from vllm.platforms.cpu import CpuPlatform

    original = CpuPlatform.get_attn_backend_cls.__func__

    @functools.wraps(original)
    def get_attn_backend_cls(
        cls: type,
        selected_backend: Any,
        attn_selector_config: Any,
        num_heads: int | None = None,
    ) -> str:
        if selected_backend is None or selected_backend.name != NAME:
            return original(cls, selected_backend, attn_selector_config, num_heads)
        invalid_reasons = selected_backend.get_class().validate_configuration(
            device_capability=None, **attn_selector_config._asdict()
        )
        if invalid_reasons:
            raise ValueError(
                f"Selected backend {selected_backend} is not valid for this configuration. "
                f"Reason: {invalid_reasons}"
            )
        return selected_backend.get_path()

    CpuPlatform.get_attn_backend_cls = classmethod(get_attn_backend_cls)


def extend_context() -> None:
    """Target: EngineArgs.create_model_config.

    It refuses a --max-model-len over the length that the model's config derives.
    Until: patches/0003.
    """
    from vllm.engine.arg_utils import EngineArgs

    original = EngineArgs.create_model_config

    @functools.wraps(original)
    def create_model_config(self: EngineArgs) -> Any:
        asked = self.max_model_len
        if not selects_dca(self) or asked is None or asked <= 0:
            return original(self)
        self.max_model_len = None
        try:
            model_config = original(self)
        finally:
            self.max_model_len = asked
        model_config.original_max_model_len = model_config.max_model_len = asked
        return model_config

    EngineArgs.create_model_config = create_model_config


def verify_config() -> None:
    """Target: EngineArgs.create_engine_config.

    An attention backend has no say in the configuration before the engine starts.
    Until: patches/0004.
    """
    from vllm.engine.arg_utils import EngineArgs

    original = EngineArgs.create_engine_config

    @functools.wraps(original)
    def create_engine_config(self: EngineArgs, *args: Any, **kwargs: Any) -> Any:
        vllm_config = original(self, *args, **kwargs)
        drafter = getattr(vllm_config.speculative_config, "attention_backend", None)
        if names_dca(vllm_config.attention_config, drafter):
            AttentionBackendEnum[NAME].get_class().verify_and_update_config(vllm_config)
        return vllm_config

    EngineArgs.create_engine_config = create_engine_config


def prepare_model() -> None:
    """Target: BaseModelLoader.create_model.

    An attention backend never sees the model that its layers are part of.
    Until: patches/0005.
    """
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    original = BaseModelLoader.create_model

    @functools.wraps(original)
    def create_model(
        self: BaseModelLoader, vllm_config: Any, model_config: Any, prefix: str = ""
    ) -> Any:
        model = original(self, vllm_config, model_config, prefix)
        # Selected, not in use: of a model whose layers bring their own, DCA must know too.
        if names_dca(vllm_config.attention_config):
            AttentionBackendEnum[NAME].get_class().prepare_model(model, vllm_config)
        return model

    BaseModelLoader.create_model = create_model


class Shim(NamedTuple):
    """A change to vLLM, made from outside.

    Attributes:
        apply: makes it.
        target: what it calls or replaces, as module:name.
        parameters: the target's, as they were when the shim was written.
        hook: what a vLLM has that was patched, and does without the shim; as module:name.
    """

    apply: Callable[[], None]
    target: str
    parameters: str
    hook: str

    @property
    def name(self) -> str:
        """The function's."""
        return self.apply.__name__

    def is_needed(self) -> bool:
        """Whether this vLLM has no hook in the shim's place."""
        return _found(self.hook) is None

    def moved(self) -> str | None:
        """How the target is another than the shim was written for; None if it is not."""
        target, name = _found(self.target), self.target.partition(":")[2]
        if target is None:
            return (
                f"{self.target} is gone from vLLM {vllm.__version__}, and the shim {self.name} "
                "was written for it"
            )
        parameters = f"({', '.join(inspect.signature(target).parameters)})"
        if parameters == self.parameters:
            return None
        return (
            f"{name} takes {parameters} in vLLM {vllm.__version__}, and the shim {self.name} "
            f"was written for {self.parameters}"
        )


def _found(name: str) -> Any:
    """What a module:name names, or None."""
    try:
        return pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return None


_BACKEND = "vllm.v1.attention.backend:AttentionBackend"
SHIMS = (
    Shim(
        pickle_by_name,
        "vllm.v1.attention.backends.registry:AttentionBackendEnum.register",
        "(name, value)",
        "vllm.v1.attention.backends.registry:restore_backend",
    ),
    Shim(
        select_on_cpu,
        "vllm.platforms.cpu:CpuPlatform.get_attn_backend_cls",
        "(selected_backend, attn_selector_config, num_heads)",
        "vllm.platforms.cpu:CpuPlatform.selects_registered_backends",
    ),
    Shim(
        extend_context,
        "vllm.engine.arg_utils:EngineArgs.create_model_config",
        "(self)",
        f"{_BACKEND}.extends_context",
    ),
    Shim(
        verify_config,
        "vllm.engine.arg_utils:EngineArgs.create_engine_config",
        "(self, usage_context, headless)",
        f"{_BACKEND}.verify_and_update_config",
    ),
    Shim(
        prepare_model,
        "vllm.model_executor.model_loader.base_loader:BaseModelLoader.create_model",
        "(self, vllm_config, model_config, prefix)",
        f"{_BACKEND}.prepare_model",
    ),
)
