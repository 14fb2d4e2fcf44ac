"""A C++ file compiled into a library, and kept on disk: whole or not at all.

torch's builder for its own compiled CPU code finds the compiler, names the processor and links
OpenMP. Its cache writes a library in place and loads it unseen, so that one that was cut short
stays, and a process that loads it may die. Here a library gets its name when it is whole, and
its name says what must be in it.
"""

import contextlib
import ctypes
import hashlib
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

# Longer than a compiler takes where others keep the processor busy.
LOCK_S = 600
FOLDER = "vllm-dca"
# Of what a compiler said, in a message.
MOST_SAID = 300


class BuildError(RuntimeError):
    """A library cannot be had; says why, and what would help."""


def library(source: str, flags: Sequence[str]) -> ctypes.CDLL:
    """Compile a library, or find it compiled. Processes that want the same one wait in turn.

    What was damaged since it was compiled is not loaded, but compiled again.

    Args:
        source: all of the code, which includes no file of its own.
        flags: beyond torch's own for such code.

    Raises:
        BuildError: no compiler, one that fails, or no folder to keep it in.
    """
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    folder = "unknown"
    try:
        folder = cache_dir()
        return ctypes.CDLL(str(_kept(Path(folder) / FOLDER, source, flags)))
    except InvalidCxxCompiler as error:
        why = f"there is no C++ compiler: {error}"
    except CppCompileError as error:
        why = f"{error.cmd[0]} failed: {_said(error.output)}"
    except OSError as error:
        why = str(error)
    except Exception as error:  # torch's builder is its own: another torch may raise anything
        why = f"{type(error).__name__}: {error}"
    raise BuildError(
        f"{why}; it takes g++ or clang++, which CXX may name, and a folder with room that may "
        f"be written and run from, which TORCHINDUCTOR_CACHE_DIR may name and is {folder}"
    )


def is_gcc() -> bool:
    """Whether the compiler is GNU's; no if there is none."""
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return bool(cpp_builder.is_gcc())
    except (InvalidCxxCompiler, OSError):
        return False


def _kept(folder: Path, source: str, flags: Sequence[str]) -> Path:
    """The library's file, whole at this moment."""
    from torch._inductor.cpp_builder import CppBuilder, CppTorchDeviceOptions
    from torch.utils._filelock import FileLock

    options = CppTorchDeviceOptions(device_type="cpu", extra_flags=flags)
    command = CppBuilder("library", "source.cpp", options).get_command_line()
    key = hashlib.sha256(f"{command}\n{source}".encode()).hexdigest()[:16]
    # Without the lock first: the folder may be one that others write.
    if (path := _found(folder, key)) is not None:
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f"{key}.lock", timeout=LOCK_S):
        if (path := _found(folder, key)) is not None:
            return path
        for damaged in folder.glob(f"{key}-*.so"):
            damaged.unlink()
        for left in folder.glob(f"{key}-*.part"):  # of a process that was killed
            shutil.rmtree(left)
        # On the same disk, so that it gets its name in one step.
        with tempfile.TemporaryDirectory(".part", f"{key}-", folder) as scratch:
            code = Path(scratch) / "source.cpp"
            code.write_text(source)
            builder = CppBuilder("library", str(code), options, scratch)
            builder.build()
            made = Path(builder.get_target_file_path())
            return made.replace(folder / _name(key, made))


def _found(folder: Path, key: str) -> Path | None:
    for path in folder.glob(f"{key}-*.so"):
        with contextlib.suppress(OSError):  # deleted meanwhile, or not ours to read
            if path.name == _name(key, path):
                return path
    return None


def _name(key: str, path: Path) -> str:
    return f"{key}-{hashlib.sha256(path.read_bytes()).hexdigest()[:32]}.so"


def _said(output: str) -> str:
    """The first error that a compiler names, or else its last words."""
    lines = [line.strip() for line in output.splitlines() if line.strip()] or [
        "it said nothing"
    ]
    errors = (line for line in lines if "error" in line.lower() or "No space" in line)
    return next(errors, lines[-1])[:MOST_SAID]
