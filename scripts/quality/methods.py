"""Ways to read past the trained window, by a name, and vLLM's engine with one of them.

    plain       the model's own RoPE, its table made long enough
    yarn        YaRN, as vLLM does it
    dynamic     dynamic NTK, as vLLM does it
    dca         Dual Chunk Attention
    dca+yarn    Dual Chunk Attention over a window that YaRN doubles

Options follow a colon: `yarn:factor=8`, `dca:chunk_size=4096,local_size=512`. Without a factor,
yarn takes what reaches the length asked for, dynamic 2, the usual one. With one of sparse
prefill's options, `dca:sparse_coverage=0.9`, it is on.
"""

import contextlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.common import backends

if TYPE_CHECKING:
    from vllm import LLM

SCALINGS = {"yarn": "yarn", "dynamic": "dynamic", "dca+yarn": "yarn"}
NAMES = {
    "plain": "plain RoPE",
    "yarn": "YaRN",
    "dynamic": "dynamic NTK",
    "dca": "DCA",
    "dca+yarn": "DCA on YaRN",
}
DEFAULT = " ".join(NAMES)


def name_of(label: str) -> str:
    """As people read it."""
    name, _, options = label.partition(":")
    return NAMES[name] + (f" ({options})" if options else "")


@dataclass(frozen=True)
class Method:
    """One of NAMES with its options; `label` is what the user wrote."""

    label: str
    name: str
    options: dict[str, Any]

    @classmethod
    def parse(cls, label: str) -> "Method":
        """From the user's words.

        Raises:
            ValueError: no such method, or options that are not NAME=NUMBER.
        """
        name, _, rest = label.partition(":")
        if name not in NAMES:
            raise ValueError(f"no method {name!r}: choose from {', '.join(NAMES)}")
        pairs = [item.split("=") for item in rest.split(",") if item]
        if any(len(pair) != 2 for pair in pairs):
            raise ValueError(f"{label!r}: options are NAME=NUMBER, with commas between them")
        shares = ("factor", "sparse_coverage")
        options = {key: float(v) if key in shares else int(v) for key, v in pairs}
        return cls(label, name, options)

    @property
    def is_dca(self) -> bool:
        return self.name.startswith("dca")

    def engine_options(self, config: Any, length: int) -> dict[str, Any]:
        """What `LLM` takes for it: a model of this Hugging Face config, to this length."""
        window = config.max_position_embeddings
        options = dict(self.options)
        usual = {"yarn": max(length / window, 1.0), "dynamic": 2.0, "dca+yarn": 2.0}
        factor = options.pop("factor", usual.get(self.name))
        given: dict[str, Any] = {}
        if self.name in SCALINGS:
            given["rope_parameters"] = {
                **config.rope_parameters,
                "rope_type": SCALINGS[self.name],
                "factor": factor,
            }
        if SCALINGS.get(self.name) == "yarn":
            # vLLM, as transformers, takes the length that YaRN reaches for the model's own.
            given["rope_parameters"]["original_max_position_embeddings"] = window
            given["max_position_embeddings"] = math.ceil(window * factor)
        elif self.name == "dynamic":
            # vLLM makes the table once, for this length.
            given["rope_parameters"]["max_trained_positions"] = window
            given["max_position_embeddings"] = max(length, window)
        elif self.name == "plain":
            # Nothing but a rotary table that is long enough.
            given["max_position_embeddings"] = max(length, window)
        if self.is_dca:
            if any(key.startswith("sparse_") for key in options):
                options["sparse"] = "auto"
            return {
                "attention_backend": "DCA",
                "hf_overrides": given,
                "additional_config": {"dca": options},
            }
        if options:
            raise ValueError(f"{self.label!r}: {self.name} has no {', '.join(options)}")
        return {"hf_overrides": given}


def use_every_core() -> None:
    """Before vLLM is imported or started; and what it says is only what is wrong."""
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", cores)
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")


def prepare_environment() -> None:
    """Before vLLM is imported: every core, and `apply_model` allowed."""
    use_every_core()
    # apply_model sends a function to the worker.
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"


@contextlib.contextmanager
def engine(
    model: Path, method: Method, length: int, **options: Any
) -> Iterator["tuple[LLM, str]"]:
    """An engine, and the backends that it runs; it stops if they are not the method's."""
    from transformers import AutoConfig
    from vllm import LLM

    chosen = method.engine_options(AutoConfig.from_pretrained(model), length)
    llm = LLM(str(model), max_model_len=length, **chosen, **options)
    try:
        workers = llm.apply_model(backends.of_layers)
        ran = sorted({backend for worker in workers for backend in worker})
        if any(backend.startswith("DCA") for backend in ran) != method.is_dca:
            raise RuntimeError(f"{method.label}: the layers run {', '.join(ran)}")
        yield llm, ", ".join(ran)
    finally:
        llm.llm_engine.engine_core.shutdown()
