"""The patches for vLLM: each retires one shim, and vLLM then does itself what the shim did.

A patched vLLM is a folder of links to the installed one, with copies of the files that the
patches change and with the tests that they add. What needs vLLM runs in processes of its own,
which a fork server starts with the libraries loaded that take longest to import.
"""

import importlib
import importlib.util
import json
import logging
import multiprocessing
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import pytest

if TYPE_CHECKING:
    from vllm.v1.attention.selector import AttentionSelectorConfig

INSTALLED = Path(importlib.util.find_spec("vllm").origin).parents[1]
README = Path(__file__).parents[2] / "patches/README.md"
PATCHES = sorted(README.parent.glob("*.patch"))
# Patches in force: none, so that the shims do it all; each alone; all, without any shim.
SETUPS = {"shims": [], **{patch.name[:4]: [patch] for patch in PATCHES}, "patches": PATCHES}
each_minor = pytest.mark.each_minor
# On every minor the shims do it all, or the patches; each patch alone on the installed vLLM.
EITHER = ("shims", "patches")
IN_SETUPS = pytest.mark.parametrize(
    "setup",
    [pytest.param(name, marks=each_minor if name in EITHER else ()) for name in SETUPS],
)
SHIMS = ["pickle_by_name", "select_on_cpu", "extend_context", "verify_config", "prepare_model"]
TIMEOUT = 300  # seconds
PRELOAD = ["torch._inductor.compile_fx", "transformers.modeling_gguf_pytorch_utils", "openai"]

WINDOW = 512
# A chunk_size of 3/4 of the window; 1/6 of it local, up to a chunk of whole 128-token blocks.
SETTINGS = {
    "chunk_size": 384,
    "local_size": 128,
    "original_max_position_embeddings": None,
    "source": f"derived from the trained window of {WINDOW} tokens",
    "window": WINDOW,
    "prefill_provider": None,
    "sparse": None,
}
DCA_PATH = "vllm_dca.engine.backend.DcaBackend"
CPU_PATH = "vllm.v1.attention.backends.cpu_attn.CPUAttentionBackend"
TOO_LONG = f"User-specified max_model_len ({4 * WINDOW}) is greater than the derived"

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "float32",
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 2,
    "vocab_size": 64,
    "max_position_embeddings": WINDOW,
    "rope_theta": 10000.0,
}

# Why the patches' own tests fail in a vLLM without them. Those that are not named here say what
# stays as it was.
WITHOUT_PATCH = {
    "test_registered_backend_pickling": {
        "test_unpickled_before_the_plugin_is_loaded[BY_PATH]": (
            "'test_registered_backend_pickling.OutOfTreeBackend' is not a valid "
            "AttentionBackendEnum"
        ),
        "test_unpickled_before_the_plugin_is_loaded[BY_DECORATOR]": (
            "Backend TORCH_SDPA must be registered before use"
        ),
    },
    "test_cpu_registered_backends": {
        "test_registered_backend_is_selected": f"'{CPU_PATH}' ==",
        "test_registered_backend_is_validated": "DID NOT RAISE",
    },
    "test_backend_extends_context": dict.fromkeys(
        [f"test_backend_that_extends_the_context[selected{i}]" for i in range(3)], TOO_LONG
    ),
    "test_backend_verifies_config": {
        **dict.fromkeys(
            [f"test_selected_backend_updates_the_config_once[selected{i}]" for i in range(4)],
            "assert {} == {'calls': 1}",
        ),
        "test_selected_backend_refuses_the_config": "DID NOT RAISE",
    },
    "test_backend_prepares_model": {
        f"test_selected_backend_prepares_the_model_once[{selected}]": "assert [] == [("
        for selected in (
            "backend0-backend_per_kind0-1",
            "None-backend_per_kind1-1",
            "backend2-backend_per_kind2-1",
        )
    },
}

Observed = Callable[[str], dict[str, Any]]

# Somebody else's backend, for which vLLM has no shims.
OTHER_BACKEND = """
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

class OtherBackend(CPUAttentionBackend):
    prepared = []

    @classmethod
    def extends_context(cls):
        return True

    @classmethod
    def verify_and_update_config(cls, vllm_config):
        vllm_config.additional_config = {"other": vllm_config.model_config.max_model_len}

    @classmethod
    def prepare_model(cls, model, vllm_config):
        cls.prepared.append(type(model).__name__)
"""


# The patches as files.


def _changed(patch: Path) -> list[Path]:
    """Files of vLLM."""
    return [Path(path) for path in re.findall(r"^--- a/(\S+)$", patch.read_text(), re.M)]


def _added(patch: Path) -> list[Path]:
    """Tests for vLLM. A wheel of it has none, and no folder to put them in."""
    new = r"^--- /dev/null\n\+\+\+ b/(\S+)$"
    return [Path(path) for path in re.findall(new, patch.read_text(), re.M)]


def _git(root: Path, *args: str | Path) -> str:
    return subprocess.run(
        ["git", "-c", "user.name=tests", "-c", "user.email=", *args],
        cwd=root,
        # Not to be taken for a part of a repository around it.
        env={**os.environ, "GIT_CEILING_DIRECTORIES": str(root.parent)},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout


def _overlay(root: Path, patches: list[Path]) -> Path:
    """Make `root` hold a vllm package that differs from the installed one by the patches."""
    changed = {path for patch in patches for path in _changed(patch)}
    folders = {folder for path in changed for folder in path.parents} - {Path()}
    for folder in sorted(folders):
        (root / folder).mkdir(parents=True)
        for entry in (INSTALLED / folder).iterdir():
            path = folder / entry.name
            if path in changed:
                shutil.copyfile(entry, root / path)
            # Its own, where patched files are cached for it alone; that of files as installed.
            elif entry.name == "__pycache__":
                shutil.copytree(entry, root / path)
            elif path not in folders:
                (root / path).symlink_to(entry)
    for patch in patches:
        _git(root, "apply", "--check", patch)
        _git(root, "apply", patch)
    return root


def _copy_changed(root: Path) -> None:
    """What a checkout, or an installation, has of the files that the patches change."""
    for path in {path for patch in PATCHES for path in _changed(patch)}:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(INSTALLED / path, root / path)


@pytest.fixture(scope="module")
def overlays(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path | None]:
    made: dict[str, Path] = {}

    def overlay(setup: str) -> Path | None:
        if SETUPS[setup] and setup not in made:
            made[setup] = _overlay(tmp_path_factory.mktemp(setup), SETUPS[setup])
        return made.get(setup)

    return overlay


@each_minor
@pytest.mark.parametrize("setup", [setup for setup in SETUPS if setup != "shims"])
def test_patches_apply_to_the_installed_vllm(
    setup: str, overlays: Callable[[str], Path]
) -> None:
    root = overlays(setup)
    for patch in SETUPS[setup]:
        assert _changed(patch)
        assert len(_added(patch)) == 1
        for path in _changed(patch):
            assert (root / path).read_text() != (INSTALLED / path).read_text()
        for path in _changed(patch) + _added(patch):
            compile((root / path).read_text(), path, "exec")


@each_minor
def test_git_takes_the_patches_as_mails(tmp_path: Path) -> None:
    _copy_changed(tmp_path)
    _git(tmp_path, "init", "--quiet")
    _git(tmp_path, "add", ".")
    _git(tmp_path, "commit", "--quiet", "--message", "vLLM")
    base = _git(tmp_path, "rev-parse", "HEAD").strip()
    results = set()
    for order in (PATCHES, PATCHES[::-1]):
        _git(tmp_path, "checkout", "--quiet", "--detach", base)
        _git(tmp_path, "am", "--quiet", "--keep-non-patch", *order)
        results.add(_git(tmp_path, "rev-parse", "HEAD^{tree}"))
    assert len(results) == 1
    subjects = _git(tmp_path, "log", "--format=%s", f"{base}..").splitlines()
    assert len(subjects) == len(PATCHES)
    assert all(re.fullmatch(r"\[(Attention|CPU)\] [A-Z].*[a-z]", line) for line in subjects)


@each_minor
def test_patches_apply_to_an_installation_as_the_page_says(tmp_path: Path) -> None:
    """In an environment inside a repository, as .venv is here."""
    root = tmp_path / "environment"
    _copy_changed(root)
    (root / "vllm/__init__.py").touch()
    _git(tmp_path, "init", "--quiet")
    [commands] = re.findall(r"^```sh\n(.*?)^```$", README.read_text(), re.M | re.S)
    subprocess.run(
        ["bash", "-ec", commands.replace("/path/to/vllm-dca", str(README.parents[1]))],
        env={
            **os.environ,
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "PYTHONPATH": str(root),
        },
        check=True,
    )
    for patch in PATCHES:
        for path in _changed(patch):
            assert (root / path).read_text() != (INSTALLED / path).read_text()
    assert [entry.name for entry in root.iterdir()] == ["vllm"]


# What runs in the other processes. Only there is vLLM imported.


def _use_vllm(overlay: Path | None, *paths: Path, plugins: str = "") -> None:
    """Choose which vLLM this process, and those it starts, will import."""
    assert "vllm" not in sys.modules
    first = [str(path) for path in (overlay, *paths) if path]
    sys.path[:0] = first
    os.environ["PYTHONPATH"] = os.pathsep.join(first)
    # EngineArgs loads plugins, and the tests want to say when.
    os.environ["VLLM_PLUGINS"] = plugins


def _error(function: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """The error that a call raises, or what it returns."""
    try:
        return f"no error: {function(*args, **kwargs)}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _selector_config(**changes: Any) -> "AttentionSelectorConfig":
    import torch
    from vllm.v1.attention.selector import AttentionSelectorConfig

    usual = {"head_size": 64, "dtype": torch.float32, "kv_cache_dtype": "auto"}
    return AttentionSelectorConfig(**{"block_size": 128, **usual, **changes})


def _select(backend: Any, **changes: Any) -> str:
    from vllm.platforms.cpu import CpuPlatform

    return CpuPlatform.get_attn_backend_cls(backend, _selector_config(**changes))


def _engine_args(model: Path, max_model_len: int | None, **args: Any) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(
        model=str(model), skip_tokenizer_init=True, max_model_len=max_model_len, **args
    )


def _engine_config(model: Path, max_model_len: int | None, **args: Any) -> Any:
    return _engine_args(model, max_model_len, **args).create_engine_config()


def _create_model(vllm_config: Any) -> Any:
    from vllm.config import set_current_vllm_config
    from vllm.distributed import (
        init_distributed_environment,
        initialize_model_parallel,
        model_parallel_is_initialized,
    )
    from vllm.model_executor.model_loader import get_model_loader

    with set_current_vllm_config(vllm_config):
        if not model_parallel_is_initialized():
            rendezvous = f"{vllm_config.model_config.model}/rendezvous-{os.getpid()}"
            init_distributed_environment(1, 0, f"file://{rendezvous}", 0, "gloo")
            initialize_model_parallel()
        loader = get_model_loader(vllm_config.load_config)
        return loader.create_model(
            vllm_config=vllm_config, model_config=vllm_config.model_config
        )


def _settled(vllm_config: Any) -> dict[str, Any]:
    model_config = vllm_config.model_config
    return {
        "max_model_len": model_config.max_model_len,
        "original_max_model_len": model_config.original_max_model_len,
        "additional_config": vllm_config.additional_config,
    }


def _observe_upstream(model: Path) -> dict[str, Any]:
    """What vLLM does as long as nobody selects a backend of a plugin."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    # The last two are selected, and are for another device, and without a class.
    backends = [None, *map(AttentionBackendEnum.__getitem__, ("FLASH_ATTN", "TORCH_SDPA"))]
    built_in = [member for member in AttentionBackendEnum if member.name != "DCA"]
    vllm_config = _engine_config(model, None)
    created = _create_model(vllm_config)
    return {
        "selected": {
            f"{backend} {changes}": _error(_select, backend, **changes)
            for backend in backends
            for changes in ({}, {"use_mla": True}, {"use_sparse": True})
        },
        "pickled": [pickle.dumps(member) for member in built_in],
        "unpickled": [
            member.name
            for member in built_in
            if pickle.loads(pickle.dumps(member)) is not member
        ],
        "settled": [
            _settled(_engine_config(model, length, **args))
            for length in (None, -1, WINDOW // 2)
            for args in ({}, {"attention_backend": "FLASH_ATTN"})
        ],
        "hash": vllm_config.compute_hash(),
        "too long": _error(_engine_config, model, 4 * WINDOW),
        "too long, other backend": _error(
            _engine_config, model, 4 * WINDOW, attention_backend="FLASH_ATTN"
        ),
        "modules": [(name, str(module)) for name, module in created.named_modules()],
        "buffers": [(name, buffer.sum().item()) for name, buffer in created.named_buffers()],
    }


def _observe_dca(model: Path) -> dict[str, Any]:
    """What each shim, or its patch, is for."""
    import torch
    from vllm.config import AttentionConfig
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from vllm_dca.engine.backend import DcaBackend

    prepared = []
    prepare_model = DcaBackend.prepare_model

    def record(module: Any, vllm_config: Any) -> None:
        prepared.append(module)
        prepare_model(module, vllm_config)

    DcaBackend.prepare_model = record
    engine_args = _engine_args(model, 4 * WINDOW, attention_backend="dca")
    vllm_config = engine_args.create_engine_config()
    created = _create_model(vllm_config)
    layers = [layer.self_attn for layer in created.model.layers]

    dca = AttentionBackendEnum["DCA"]
    user_config = {"dca": {"chunk_size": 256, "local_size": 128}}
    args = {"attention_backend": "dca", "additional_config": user_config}
    return {
        "pickle": pickle.dumps(AttentionConfig(backend="dca")),
        "selected": _select(dca),
        "invalid": {
            key: _error(_select, dca, **{key: value})
            for key, value in {
                "use_mla": True,
                "use_sparse": True,
                "dtype": torch.float64,
                "kv_cache_dtype": "fp8",
            }.items()
        },
        "settled": {
            "flag": _settled(vllm_config),
            "flag again": _settled(engine_args.create_engine_config()),
            "config": _settled(
                _engine_config(model, 4 * WINDOW, attention_config={"backend": "dca"})
            ),
            "short": _settled(_engine_config(model, WINDOW // 2, attention_backend="dca")),
            "derived": _settled(_engine_config(model, None, attention_backend="dca")),
            "fitted": _settled(_engine_config(model, -1, attention_backend="dca")),
            "sizes": _settled(_engine_config(model, 4 * WINDOW, **args)),
        },
        "user's config": user_config,
        "refused": _error(
            _engine_config,
            model,
            None,
            attention_backend="dca",
            additional_config={"dca": {"chunk_sise": 384}},
        ),
        "refused kind": _error(
            _engine_config,
            model,
            4 * WINDOW,
            attention_config={"backend_per_kind": {"full_attention": "dca"}},
        ),
        "refused drafter": _error(
            _engine_config,
            model,
            None,
            speculative_config={
                "method": "ngram",
                "num_speculative_tokens": 1,
                "attention_backend": "dca",
            },
        ),
        "prepared": [module is created for module in prepared],
        "rotations": [type(layer.attn.impl.rotation).__name__ for layer in layers],
        "tables": [len(layer.rotary_emb.cos_sin_cache) for layer in layers],
    }


def _observe(overlay: Path | None, model: Path) -> dict[str, Any]:
    _use_vllm(overlay)
    before = _observe_upstream(model)

    from vllm_dca.engine import shims

    applied = shims.apply()
    return {
        "vllm": importlib.import_module("vllm").__file__,
        "docstrings": {shim.name: shim.apply.__doc__ for shim in shims.SHIMS},
        "applied": applied,
        "applied again": shims.apply(),
        "before": before,
        "after": _observe_upstream(model),
        "dca": _observe_dca(model),
    }


def _receive(overlay: Path | None, pickled: bytes) -> dict[str, Any]:
    _use_vllm(overlay, plugins="dca")
    config = pickle.loads(pickled)

    from vllm.plugins import load_general_plugins
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    received = {"name": config.backend.name, "path": config.backend.get_path()}
    load_general_plugins()
    return {
        **received,
        "same": AttentionBackendEnum["DCA"] is config.backend,
        "selected": _select(config.backend),
    }


def _observe_other(overlay: Path, model: Path, other: Path) -> dict[str, Any]:
    _use_vllm(overlay, other)
    from other_backend import OtherBackend
    from vllm.config import AttentionConfig
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend("OTHER")(OtherBackend)
    vllm_config = _engine_config(model, 4 * WINDOW, attention_backend="other")
    _create_model(vllm_config)
    register_backend("PLAIN", CPU_PATH)  # one without any of the hooks
    plain = _engine_config(model, WINDOW, attention_backend="plain")
    return {
        "pickle": pickle.dumps(AttentionConfig(backend="other")),
        "selected": _select(AttentionBackendEnum["OTHER"]),
        "settled": _settled(vllm_config),
        "prepared": OtherBackend.prepared,
        "plain": _settled(plain),
        "plain model": type(_create_model(plain)).__name__,
        "plain, too long": _error(_engine_config, model, 4 * WINDOW, attention_backend="plain"),
    }


def _receive_other(overlay: Path, pickled: bytes, other: Path) -> list[bool]:
    _use_vllm(overlay, other)
    backend = pickle.loads(pickled).backend

    from other_backend import OtherBackend
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    restored = backend.get_class() is OtherBackend
    register_backend("OTHER")(OtherBackend)  # as its plugin would, loaded late
    again = _error(AttentionBackendEnum.register, "OTHER", "")
    return [
        restored,
        backend.get_class() is OtherBackend,
        AttentionBackendEnum["OTHER"] is backend,
        again.startswith("ValueError: Backend OTHER already exists"),
    ]


def _observe_gates() -> dict[str, dict[str, Any]]:
    """Let every check of `apply` fail once, then none."""
    _use_vllm(None)
    import copyreg

    import vllm
    from vllm.config import AttentionConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from vllm_dca import plugin
    from vllm_dca.engine import shims

    targets = {
        "pickle_by_name": (AttentionBackendEnum, "register"),
        "select_on_cpu": (CpuPlatform, "get_attn_backend_cls"),
        "extend_context": (EngineArgs, "create_model_config"),
        "verify_config": (EngineArgs, "create_engine_config"),
        "prepare_model": (BaseModelLoader, "create_model"),
    }
    originals = [vars(owner)[name] for owner, name in targets.values()]

    def changed(something: Any, else_: Any) -> None:
        raise AssertionError

    logged: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = logged.append
    logging.getLogger("vllm").addHandler(handler)

    def attempt() -> dict[str, Any]:
        importlib.reload(shims)  # it reads the signatures when it is imported
        present = [vars(owner)[name] for owner, name in targets.values()]
        logged.clear()
        error = _error(shims.apply)
        plugin.register()
        return {
            "error": error,
            "logged": [f"{r.levelname} {r.name} {r.getMessage()}" for r in logged],
            "shimmed": [
                shim
                for shim, (owner, name), was in zip(
                    targets, targets.values(), present, strict=True
                )
                if vars(owner)[name] is not was
            ],
            "pickles": AttentionBackendEnum in copyreg.dispatch_table,
            "selected": _error(AttentionConfig, backend="dca"),
        }

    attempts = {}
    for version in ("0.31.0", "0.34.0", "1.32.0"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(vllm, "__version__", version)
            attempts[version] = attempt()
    for shim, (owner, name) in targets.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, name, staticmethod(changed))
            attempts[shim] = attempt()
    assert [vars(owner)[name] for owner, name in targets.values()] == originals
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vllm, "__version__", "0.32.9.post1+cpu")
        attempts["none"] = attempt()
    return attempts


def _run_upstream_tests(root: Path) -> dict[str, dict[str, str]]:
    """By file, why each test in `root` fails; "" where it does not."""
    report = root / "report.xml"
    inherited = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-vv", "-p", "no:cacheprovider"),
            *(f"--rootdir={root}", f"--junit-xml={report}", "tests"),
        ],
        cwd=root,
        env={
            **os.environ,
            # Another minor of vLLM may be there; this project must not.
            "PYTHONPATH": os.pathsep.join([str(root), *map(os.path.abspath, inherited)]),
            "VLLM_PLUGINS": "",
        },
        stdout=subprocess.DEVNULL,
        timeout=2 * TIMEOUT,
    )
    found: dict[str, dict[str, str]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        file = case.attrib["classname"].rpartition(".")[2]
        why = " ".join(f"{each.attrib['message']} {each.text}" for each in case)
        found.setdefault(file, {})[case.attrib["name"]] = why
    return found


@pytest.fixture(scope="module")
def pool() -> Iterator[Any]:
    """A fresh process for every task."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with context.Pool(2, maxtasksperchild=1) as pool:
        yield pool


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("other")
    (path / "other_backend.py").write_text(OTHER_BACKEND)
    return path


@pytest.fixture(scope="module")
def asked(request: pytest.FixtureRequest) -> list[str]:
    """The setups that a selected test looks into."""
    looking = [item for item in request.session.items if "asked" in item.fixturenames]
    named = {item.callspec.params["setup"] for item in looking if hasattr(item, "callspec")}
    return [setup for setup in SETUPS if setup == "shims" or setup in named]


@pytest.fixture(scope="module")
def observed(
    pool: Any,
    asked: list[str],
    other: Path,
    overlays: Callable[[str], Path | None],
    tmp_path_factory: pytest.TempPathFactory,
) -> Observed:
    """What `_observe` returns in a setup; _observe_other, "other"; _observe_gates, "gates"."""
    model = tmp_path_factory.mktemp("model")
    (model / "config.json").write_text(json.dumps(LLAMA))
    tasks: dict[str, tuple[Any, ...]] = {
        **{setup: (_observe, overlays(setup), model) for setup in asked},
        "other": (_observe_other, overlays("patches"), model, other),
        "gates": (_observe_gates,),
    }
    results = {name: pool.apply_async(task, args) for name, (task, *args) in tasks.items()}
    return lambda name: results[name].get(TIMEOUT)


@pytest.fixture(scope="module")
def received(
    pool: Any,
    asked: list[str],
    observed: Observed,
    other: Path,
    overlays: Callable[[str], Path | None],
) -> Callable[[str], Any]:
    """What another process makes of a config that was pickled in a setup, or in "other"."""
    results = {
        setup: pool.apply_async(_receive, (overlays(setup), observed(setup)["dca"]["pickle"]))
        for setup in ("shims", "0001", "patches")
        if setup in asked
    }
    results["other"] = pool.apply_async(
        _receive_other, (overlays("patches"), observed("other")["pickle"], other)
    )
    return lambda name: results[name].get(TIMEOUT)


@pytest.fixture(scope="module")
def patched_tests(overlays: Callable[[str], Path]) -> dict[str, dict[str, str]]:
    """What `_run_upstream_tests` returns with all patches."""
    return _run_upstream_tests(overlays("patches"))


@pytest.fixture(scope="module")
def unpatched_tests(
    overlays: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, str]]:
    """The same of the vLLM that is there."""
    root = tmp_path_factory.mktemp("unpatched")
    shutil.copytree(overlays("patches") / "tests", root / "tests")
    return _run_upstream_tests(root)


# Every setup does the same, whoever does it.


@each_minor
def test_every_shim_names_its_patch(observed: Observed) -> None:
    docstrings = observed("shims")["docstrings"]
    assert list(docstrings) == SHIMS
    named = [re.findall(r"Until: patches/(\d+)\.$", text, re.M) for text in docstrings.values()]
    assert named == [[patch.name[:4]] for patch in PATCHES]


@IN_SETUPS
def test_a_patch_retires_its_shim(
    setup: str, observed: Observed, overlays: Callable[[str], Path]
) -> None:
    found = observed(setup)
    patched = overlays(setup)
    assert patched is None or Path(found["vllm"]).is_relative_to(patched)
    numbers = [int(patch.name[:4]) for patch in SETUPS[setup]]
    left = [shim for number, shim in enumerate(SHIMS, 1) if number not in numbers]
    assert found["applied"] == found["applied again"] == left


@IN_SETUPS
def test_nothing_changes_unless_selected(setup: str, observed: Observed) -> None:
    upstream = observed("shims")["before"]
    assert TOO_LONG in upstream["too long"]
    assert TOO_LONG in upstream["too long, other backend"]
    assert upstream["unpickled"] == []
    assert upstream["selected"]["None {}"] == f"no error: {CPU_PATH}"
    assert observed(setup)["before"] == upstream
    assert observed(setup)["after"] == upstream


@IN_SETUPS
def test_dca_is_selected_on_the_cpu(setup: str, observed: Observed) -> None:
    dca = observed(setup)["dca"]
    assert dca["selected"] == DCA_PATH
    for key, reason in {
        "use_mla": "['MLA not supported']",
        "use_sparse": "['sparse not supported']",
        "dtype": "['dtype not supported']",
        "kv_cache_dtype": "['--kv-cache-dtype fp8 on the CPU; use auto']",
    }.items():
        assert dca["invalid"][key] == (
            "ValueError: Selected backend AttentionBackendEnum.DCA is not valid for this "
            f"configuration. Reason: {reason}"
        )


@IN_SETUPS
def test_dca_settles_the_config(setup: str, observed: Observed) -> None:
    dca = observed(setup)["dca"]
    sizes = {**SETTINGS, "chunk_size": 256, "source": "--additional-config"}
    assert dca["settled"] == {
        name: {
            "max_model_len": max_model_len,
            "original_max_model_len": original,
            "additional_config": {"dca": settings},
        }
        for name, max_model_len, original, settings in [
            ("flag", 4 * WINDOW, 4 * WINDOW, SETTINGS),
            ("flag again", 4 * WINDOW, 4 * WINDOW, SETTINGS),
            ("config", 4 * WINDOW, 4 * WINDOW, SETTINGS),
            ("short", WINDOW // 2, WINDOW // 2, SETTINGS),
            ("derived", WINDOW, None, SETTINGS),
            ("fitted", WINDOW, -1, SETTINGS),
            ("sizes", 4 * WINDOW, 4 * WINDOW, sizes),
        ]
    }
    assert dca["user's config"] == {"dca": {"chunk_size": 256, "local_size": 128}}
    assert dca["refused"].startswith("ValueError: --additional-config: unknown under")
    # Past the window, and asked for by this way alone: still DCA that refuses, and says why.
    assert "does not support a backend per kind of layer" in dca["refused kind"]
    assert "attention_backend DCA needs --attention-backend dca too" in dca["refused drafter"]


@IN_SETUPS
def test_dca_prepares_the_model_once(setup: str, observed: Observed) -> None:
    dca = observed(setup)["dca"]
    assert dca["prepared"] == [True]
    assert dca["rotations"] == ["QueryRotation"] * 2
    assert dca["tables"] == [4 * WINDOW] * 2


@pytest.mark.parametrize(
    "setup", ["0001", *(pytest.param(e, marks=each_minor) for e in EITHER)]
)
def test_dca_pickles_into_a_process_without_plugins(
    setup: str, received: Callable[[str], Any]
) -> None:
    assert received(setup) == {
        "name": "DCA",
        "path": DCA_PATH,
        "same": True,
        "selected": DCA_PATH,
    }


@each_minor
def test_patches_serve_any_backend(observed: Observed, received: Callable[[str], Any]) -> None:
    found = observed("other")
    assert found["selected"] == "other_backend.OtherBackend"
    assert found["settled"] == {
        "max_model_len": 4 * WINDOW,
        "original_max_model_len": 4 * WINDOW,
        "additional_config": {"other": 4 * WINDOW},
    }
    assert found["prepared"] == ["LlamaForCausalLM"]
    assert found["plain"]["additional_config"] == {}
    assert found["plain model"] == "LlamaForCausalLM"
    assert TOO_LONG in found["plain, too long"]
    assert received("other") == [True] * 4


@each_minor
def test_apply_refuses_a_vllm_it_was_not_written_for(observed: Observed) -> None:
    attempts = dict(observed("gates"))
    accepted = attempts.pop("none")
    assert accepted == {
        "error": f"no error: {SHIMS}",
        "logged": [],
        "shimmed": SHIMS[1:],  # the first one registers with copyreg
        "pickles": True,
        "selected": accepted["selected"],
    }
    assert "AttentionBackendEnum.DCA" in accepted["selected"]
    assert len(attempts) == 3 + len(SHIMS)
    for cause, found in attempts.items():
        assert found["error"].startswith("IncompatibleVllmError: ")
        assert cause in found["error"]
        reason = found["error"].removeprefix("IncompatibleVllmError: ")
        assert found["logged"] == [
            f"WARNING vllm.plugins.dca The attention backend DCA is not available: {reason}. "
            "Install a vLLM that vllm-dca supports, or a vllm-dca that supports this vLLM."
        ]
        assert found["shimmed"] == []
        assert not found["pickles"]
        assert "Unknown attention backend: 'DCA'" in found["selected"]


OF_EACH_PATCH = pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.name[:4])


@each_minor
@OF_EACH_PATCH
def test_a_patch_s_own_tests_pass_with_it(
    patch: Path, patched_tests: dict[str, dict[str, str]]
) -> None:
    assert "vllm_dca" not in patch.read_text()
    [file] = _added(patch)
    assert file.stem in WITHOUT_PATCH
    found = patched_tests[file.stem]
    assert found == dict.fromkeys(found, "")


@OF_EACH_PATCH
def test_a_patch_s_own_tests_fail_without_it(
    patch: Path,
    patched_tests: dict[str, dict[str, str]],
    unpatched_tests: dict[str, dict[str, str]],
) -> None:
    [file] = _added(patch)
    found = unpatched_tests[file.stem]
    assert found.keys() == patched_tests[file.stem].keys()
    failed = {name for name, why in found.items() if why}
    assert failed == WITHOUT_PATCH[file.stem].keys()
    for name, reason in WITHOUT_PATCH[file.stem].items():
        assert reason in found[name]
