"""A compiled library is whole, of this code and processor, or the error says what helps."""

import concurrent.futures
import os
import resource
import shutil
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._inductor import cpp_builder

from vllm_dca.cpu import build, compiled, structures

CODE = 'extern "C" int answer() { return 42; }\n'
GXX = shutil.which("g++")
HELP = "TORCHINDUCTOR_CACHE_DIR may name"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / build.FOLDER


def libraries(folder: Path) -> list[Path]:
    """What is kept; nothing but locks lies beside."""
    kept = sorted(folder.glob("*.so"))
    assert {path.suffix for path in folder.iterdir()} <= {".so", ".lock"}
    return kept


def compiler(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A g++ that does something else than to compile, or before it."""
    folder.mkdir()
    path = folder / "g++"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_it_is_compiled_once_by_those_who_want_it_at_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = tmp_path / "calls"
    script = f'echo "$@" >> {calls}; sleep 0.1; exec {GXX} "$@"'
    compiler(tmp_path / "slow", script, monkeypatch)
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        for made in threads.map(lambda _: build.library(CODE, ()), range(4)):
            assert made.answer() == 42
    # torch asks it for its version, too.
    assert sum("source.cpp" in call for call in calls.read_text().splitlines()) == 1
    assert len(libraries(folder)) == 1


@pytest.mark.parametrize("damage", ["cut short", "empty", "one bit"])
def test_a_damaged_one_is_not_loaded_but_compiled_again(
    damage: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build.library(CODE, ())
    [kept] = libraries(folder)
    whole = kept.read_bytes()
    flipped = bytes([whole[len(whole) // 2] ^ 1])
    damaged = {
        "cut short": whole[: len(whole) // 2],
        "empty": b"",
        "one bit": whole[: len(whole) // 2] + flipped + whole[len(whole) // 2 + 1 :],
    }
    # Elsewhere: a process that has loaded a path does not load it again.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "other"))
    other = tmp_path / "other" / build.FOLDER
    other.mkdir(parents=True)
    (other / kept.name).write_bytes(damaged[damage])
    # What a process that was killed as it compiled left behind.
    (other / f"{kept.name.partition('-')[0]}-killed.part").mkdir()
    assert build.library(CODE, ()).answer() == 42
    [mended] = libraries(other)
    assert build._name(mended.name.partition("-")[0], mended) == mended.name


def test_a_compiler_that_is_killed_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    """It writes half of a library first."""
    script = (
        f'[ "$1" = --version ] && exec {GXX} --version\n'
        f"head -c 9000 {GXX} > ../library.so; kill -9 $$"
    )
    with pytest.MonkeyPatch.context() as patch:
        compiler(tmp_path / "killed", script, patch)
        with pytest.raises(build.BuildError, match=r"g\+\+ failed: it said nothing"):
            build.library(CODE, ())
    assert libraries(folder) == []
    assert build.library(CODE, ()).answer() == 42


def test_one_that_others_keep_needs_no_lock(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a disk that is read only, where not even a lock can be made."""
    from torch.utils import _filelock

    assert build.library(CODE, ()).answer() == 42
    monkeypatch.setattr(_filelock, "FileLock", None)
    assert build.library(CODE, ()).answer() == 42


def test_a_compiler_that_cannot_be_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch asks it for its name, and lets the system's error through."""
    (tmp_path / "g++").write_text("no program")
    monkeypatch.setenv("PATH", str(tmp_path))
    cpp_builder.cpp_compiler_search.cache_clear()
    cpp_builder.is_gcc.cache_clear()
    assert not build.is_gcc()
    with pytest.raises(build.BuildError, match="Permission denied"):
        build.library(CODE, ())


def test_another_version_is_another_file(folder: Path) -> None:
    """And the flags say the processor."""
    assert build.library(CODE, ()).answer() == 42
    assert build.library(CODE.replace("42", "43"), ()).answer() == 43
    assert build.library(CODE, ("-DPROCESSOR=0x7",)).answer() == 42
    assert len(libraries(folder)) == 3


def test_another_processor_has_flags_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []

    def library(source: str, flags: Any) -> Any:
        given.append((source, *flags))
        return types.SimpleNamespace(instructions=lambda: None)

    monkeypatch.setattr(build, "library", library)
    monkeypatch.setattr(structures, "check", lambda _: None)
    here = torch.cpu.get_capabilities()
    compiled.library.__wrapped__()
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {**here, "f16c": "another"})
    compiled.library.__wrapped__()
    [one, other] = given
    assert one != other


def test_what_fails_is_named_with_what_would_work(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(build.BuildError, match=f"g.. failed: .*error: #error NO.*{HELP}"):
        build.library("#error NO\n", ())

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(build.BuildError, match=f"failed: .*{HELP}"):
            build.library(CODE, ())
        with pytest.raises(build.BuildError, match=f"too large.*{HELP}"):
            build.library(CODE + "// long\n" * 1000, ())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    cpp_builder.cpp_compiler_search.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", "")
        with pytest.raises(build.BuildError, match=f"no C.. compiler: .*'g..'.*{HELP}"):
            build.library(CODE, ())
    assert libraries(folder) == []

    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(build.BuildError, match=f"tmp.*{HELP}"):
        build.library(CODE, ())


def test_a_full_disk_is_said_whatever_the_compiler_says_after_it() -> None:
    said = "a.s: final close failed: No space left on device\n1 file was not written\n"
    assert build._said(said).endswith("No space left on device")
