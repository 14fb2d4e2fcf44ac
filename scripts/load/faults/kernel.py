"""The compiled kernel: no compiler, no room, a damaged library, two that compile at once."""

import contextlib
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from scripts.load.faults.served import Facts, answers, refused, require, serving, serving_two
from vllm_dca.cpu.build import FOLDER

COMPILED, TORCH = "prefill by compiled", "DCA attends by torch, which takes several times"
REMEDY = "it takes g++ or clang++, which CXX may name, and a folder with room"
SERVES_ON = "serves by torch, token for token the same; a warning says why"
REFUSES = '"prefill_provider": "compiled" makes it an error with the same words'


def two_compile(model: Path, expected: list[list[int]]) -> Facts:
    """Two servers compile the kernel at once."""
    with tempfile.TemporaryDirectory() as cache:
        with serving_two(model, TORCHINDUCTOR_CACHE_DIR=cache) as both:
            for served in both:
                require(COMPILED in served.log.read_text(), "one does not attend by its kernel")
                require(answers(served) == expected, "one answers otherwise")
        kept = libraries(cache)
        require(len(kept) == 1, f"{len(kept)} libraries are kept")
    return {"clients": "", "server": "both serve by the one library", "afterwards": ""}


def library_damaged(model: Path, expected: list[list[int]]) -> Facts:
    """The kept library was cut short."""
    with tempfile.TemporaryDirectory() as cache:
        with serving(model, TORCHINDUCTOR_CACHE_DIR=cache):
            pass
        [kept] = libraries(cache)
        whole = kept.read_bytes()
        kept.write_bytes(whole[: len(whole) // 2])
        with serving(model, TORCHINDUCTOR_CACHE_DIR=cache) as served:
            require(COMPILED in served.log.read_text(), "it does not attend by its kernel")
            require(answers(served) == expected, "it answers otherwise")
        [again] = libraries(cache)
        require(len(again.read_bytes()) > len(whole) // 2, "it is as it was")
    return {"clients": "", "server": "compiles it again", "afterwards": "answers as before"}


def compiler_missing(model: Path, expected: list[list[int]]) -> Facts:
    """There is no compiler."""
    with tempfile.TemporaryDirectory() as cache:
        return uncompiled(
            *(model, expected, "there is no C++ compiler"),
            TORCHINDUCTOR_CACHE_DIR=cache,
            CXX="no-such-compiler",
        )


def compiler_fails(model: Path, expected: list[list[int]]) -> Facts:
    """The compiler fails."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "g++"
        path.write_text(
            '#!/bin/sh\n[ "$1" = --version ] && exec g++ --version\n'
            "echo internal compiler error: out of order >&2; exit 1\n"
        )
        path.chmod(0o755)
        return uncompiled(
            *(model, expected, "failed: internal compiler error: out of order"),
            TORCHINDUCTOR_CACHE_DIR=f"{folder}/cache",
            CXX=str(path),
        )


def disk_full(model: Path, expected: list[list[int]]) -> Facts:
    """The disk has no room for the compiled kernel. (Needs root: it mounts one.)"""
    with full_disk() as cache:
        return uncompiled(
            *(model, expected, "No space left on device"), TORCHINDUCTOR_CACHE_DIR=cache
        )


def uncompiled(model: Path, expected: list[list[int]], why: str, **environment: str) -> Facts:
    with serving(model, **environment) as served:
        log = served.log.read_text()
        for words in (TORCH, why, REMEDY):
            require(words in log, f"the log does not say {words!r}")
        require(COMPILED not in log, "it attends by a kernel nevertheless")
        require(answers(served) == expected, "it answers otherwise")
    with refused(model, "compiled", **environment) as log:
        for words in (why, REMEDY):
            require(words in log, f"the refusal does not say {words!r}")
    return {"clients": "", "server": SERVES_ON, "afterwards": REFUSES}


def libraries(cache: str) -> list[Path]:
    return list((Path(cache) / FOLDER).glob("*.so"))


@contextlib.contextmanager
def full_disk() -> Iterator[str]:
    """One with room for the source, and not for what is compiled from it."""
    with tempfile.TemporaryDirectory() as folder:
        mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder]
        subprocess.run(mount, check=True, capture_output=True)
        try:
            yield folder
        finally:
            subprocess.run(["umount", folder], check=True)
