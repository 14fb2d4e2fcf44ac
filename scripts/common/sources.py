"""Which code a record measures, and a digest of each file of it.

A record keeps the digests of the files that it measured, so that anybody can see, without a
history, whether they are still the same (`python -m scripts.docs.records`). Comments,
docstrings and blank lines change no result and no digest.
"""

import ast
import hashlib
import io
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# What plans and runs a step, and what it follows from. What only refuses is not among them.
_STEP = (
    *("backend", "block_size", "devices", "impl", "layers", "metadata", "remap"),
    *("rotary_replacements", "rotary_tables", "settings", "step", "window"),
)
METHOD = ("vllm_dca/method/*.py",)
CPU = ("vllm_dca/cpu/*", *METHOD)
# What a token of an answer hangs on.
ENGINE_ON_CPU = (*(f"vllm_dca/engine/{name}.py" for name in _STEP), *CPU)
CUDA = ("vllm_dca/cuda/*.py",)
COMPILED = ("scripts/bench/launches.py", *CUDA)
# Nothing of it runs unless it is asked for.
SPARSE = (
    "vllm_dca/*/*sparse*",
    "vllm_dca/method/vertical_slash.py",
    "vllm_dca/cpu/select.h",
    "vllm_dca/cpu/weigh.h",
)

# Of files that hold code; the project's shell scripts have none.
SUFFIXES = (".py", ".cpp", ".h", "")


@dataclass(frozen=True)
class Measurement:
    """A command's records in docs/results/, and what it measures."""

    records: tuple[str, ...]
    files: tuple[str, ...]
    """Patterns; the command's own module is always measured."""
    is_sparse: bool = False


MEASUREMENTS = {
    "scripts.bench.balance": Measurement(("balance",), CUDA),
    "scripts.bench.compile_kernels": Measurement(("kernels",), COMPILED, is_sparse=True),
    "scripts.bench.cpu": Measurement(("cpu", "cpu-avx2", "cpu-growth"), CPU),
    "scripts.bench.engine": Measurement(("engine-cpu", "engine-cpu-avx2"), ENGINE_ON_CPU),
    "scripts.bench.first_answer": Measurement(
        ("first-answer",),
        (
            *("scripts/setup", "scripts/serve"),
            *("scripts/common/demo_model.py", "scripts/common/pip_settings.py"),
        ),
    ),
    "scripts.bench.first_token": Measurement(
        ("first-token-32k",), ENGINE_ON_CPU, is_sparse=True
    ),
    "scripts.bench.instructions": Measurement(("cpu-instructions",), CPU),
    # How much memory vLLM's own layers keep.
    "scripts.bench.linear_memory": Measurement(("linear-memory",), ()),
    "scripts.bench.prefill_kernels": Measurement(("prefill-kernels",), COMPILED),
    "scripts.bench.sparse": Measurement(("sparse-32k", "sparse-128k"), CPU, is_sparse=True),
    "scripts.load.faults": Measurement(
        ("faults",), ("vllm_dca/engine/providers.py", *ENGINE_ON_CPU)
    ),
    "scripts.load.soak": Measurement(("soak", "soak-full"), ENGINE_ON_CPU),
    "scripts.models.sweep": Measurement(
        ("models",), ("vllm_dca/engine/*.py", "scripts/models/*.py", *CPU)
    ),
    "scripts.quality.cases": Measurement(
        ("cases",), ("vllm_dca/reference/*.py", *CPU, *CUDA), is_sparse=True
    ),
    "scripts.quality.demo": Measurement(("demo",), ENGINE_ON_CPU),
    "scripts.quality.perplexity": Measurement(
        ("perplexity", "twice-perplexity", "sizes-perplexity"), ENGINE_ON_CPU
    ),
    "scripts.quality.retrieval": Measurement(("retrieval", "sizes-retrieval"), ENGINE_ON_CPU),
    "scripts.quality.ruler": Measurement(("ruler",), ENGINE_ON_CPU),
    "scripts.quality.sparse": Measurement(
        ("sparse-quality-16k", "sparse-quality-32k", "sparse-quality-128k"),
        ("scripts/quality/kept.py", *ENGINE_ON_CPU),
        is_sparse=True,
    ),
    "scripts.quality.twice_the_window": Measurement(
        ("twice-the-window",), ("vllm_dca/reference/*.py", *ENGINE_ON_CPU)
    ),
    "scripts.quality.windows": Measurement(("windows", "windows-65k"), ENGINE_ON_CPU),
}


def module_of(record: str) -> str | None:
    """The command that makes this record of docs/results/, if one is named here."""
    made = (name for name, of in MEASUREMENTS.items() if record in of.records)
    return next(made, None)


def files_of(module: str, root: Path = ROOT) -> list[Path]:
    """What a command measures, in this checkout."""
    measurement = MEASUREMENTS[module]
    own = module.replace(".", "/")
    patterns = (*measurement.files, f"{own}.py", f"{own}/*.py")

    def matching(patterns: tuple[str, ...]) -> Iterator[Path]:
        for pattern in patterns:
            for path in root.glob(pattern):
                if path.is_file() and path.suffix in SUFFIXES and path.stat().st_size:
                    yield path

    left_out = () if measurement.is_sparse else SPARSE
    return sorted({*matching(patterns)} - {*matching(left_out)})


def digests(module: str, root: Path = ROOT) -> dict[str, str]:
    """Of each file that a command measures, by its path; none if it is not named here."""
    if module not in MEASUREMENTS:
        return {}
    return {path.relative_to(root).as_posix(): digest(path) for path in files_of(module, root)}


def digest(path: Path) -> str:
    """Of the code in a file, whatever stands in its comments."""
    strip = {".py": _python, "": _shell}.get(path.suffix, _c)
    lines = (line.rstrip() for line in strip(path.read_text()).splitlines())
    code = "\n".join(line for line in lines if line)
    return hashlib.sha256(code.encode()).hexdigest()[:12]


def _python(code: str) -> str:
    """Without comments and docstrings: both are found as Python finds them."""
    lines = code.splitlines()
    tokens = tokenize.generate_tokens(io.StringIO(code).readline)
    spans = [(*of.start, *of.end) for of in tokens if of.type == tokenize.COMMENT]
    for node in ast.walk(ast.parse(code)):
        # Any statement that is but a string: an attribute's description is one, too.
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            spans += [_span(lines, node)] * isinstance(node.value.value, str)
    # From the end, so that what is found earlier stays where it was.
    for row, column, end_row, end_column in sorted(spans, reverse=True):
        after = lines[end_row - 1][end_column:]
        lines[row - 1 : end_row] = [lines[row - 1][:column] + after] + [""] * (end_row - row)
    return "\n".join(lines)


def _span(lines: list[str], node: ast.Expr) -> tuple[int, int, int, int]:
    """First row and column, last row and column, as tokens have them: ast counts bytes."""

    def column(row: int, offset: int) -> int:
        return len(lines[row - 1].encode()[:offset].decode())

    end_row, end_offset = node.end_lineno or 0, node.end_col_offset or 0
    return (
        *(node.lineno, column(node.lineno, node.col_offset)),
        *(end_row, column(end_row, end_offset)),
    )


def _shell(code: str) -> str:
    """Without the lines that are comments."""
    return re.sub(r"^\s*#.*", "", code, flags=re.MULTILINE)


_C_COMMENT = re.compile(r'("(?:\\.|[^"\\\n])*")|//[^\n]*|/\*.*?\*/', re.DOTALL)


def _c(code: str) -> str:
    return _C_COMMENT.sub(lambda found: found[1] or "", code)
