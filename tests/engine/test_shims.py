"""Each patch for vLLM retires one shim, and vLLM then does itself what the shim did.

What needs vLLM runs in processes of its own, which a fork server starts with the libraries
loaded that take longest to import.
"""

import json
import multiprocessing
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.patched.gates import observe_gates
from tests.helpers.patched.observe import (
    CPU_PATH,
    LLAMA,
    TOO_LONG,
    WINDOW,
    observe,
    receive,
)
from tests.helpers.patched.other import OTHER_BACKEND, observe_other, receive_other
from tests.helpers.patched.overlays import PATCHES, SETUPS

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

Observed = Callable[[str], dict[str, Any]]


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
    """What `observe` returns in a setup; `observe_other`, "other"; `observe_gates`, "gates"."""
    model = tmp_path_factory.mktemp("model")
    (model / "config.json").write_text(json.dumps(LLAMA))
    tasks: dict[str, tuple[Any, ...]] = {
        **{setup: (observe, overlays(setup), model) for setup in asked},
        "other": (observe_other, overlays("patches"), model, other),
        "gates": (observe_gates,),
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
        setup: pool.apply_async(receive, (overlays(setup), observed(setup)["dca"]["pickle"]))
        for setup in ("shims", "0001", "patches")
        if setup in asked
    }
    results["other"] = pool.apply_async(
        receive_other, (overlays("patches"), observed("other")["pickle"], other)
    )
    return lambda name: results[name].get(TIMEOUT)


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
