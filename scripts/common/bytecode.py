"""Bytecode of modules that no installer has installed."""

import compileall
import sys
from pathlib import Path


def compile_modules(folder: Path) -> None:
    """Of all in a folder, where imports may not leave it (PYTHONDONTWRITEBYTECODE).

    Each process would compile all that it imports: a minute for vLLM. scripts/setup does the
    same.
    """
    if sys.dont_write_bytecode:
        compileall.compile_dir(folder, quiet=1, workers=0)
