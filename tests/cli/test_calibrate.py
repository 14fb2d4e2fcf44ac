"""`vllm-dca calibrate`: budgets that an engine takes, and that keep what was asked."""

import io
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from rich.console import Console
from typer.testing import Result

from tests.helpers import checkpoints
from tests.helpers.answers import generate
from tests.helpers.command_line import run
from tests.helpers.inprocess import engine, runner_of
from tests.helpers.ranks import one_core_each
from vllm_dca.cli import calibrate as command
from vllm_dca.engine import calibrate as worked_out
from vllm_dca.engine.calibrate import Budget, Grid
from vllm_dca.engine.impl import DcaImpl
from vllm_dca.engine.log import logger
from vllm_dca.method.sparse_config import read_budgets
from vllm_dca.method.sparse_recall import Attended

SIZES = {"chunk_size": 512, "local_size": 128, "sparse_threshold": 150}
LENGTH = 1200
RECALL = 0.8
# Each of the two steps has a segment.
STEP = 800


class Calibrated(NamedTuple):
    """What a calibration left.

    Attributes:
        folder: has the model, its text, and the budgets.
        printed: by the command.
        steps: what it was told of, after each step that it read.
    """

    folder: Path
    printed: str
    steps: list[int]

    @property
    def budgets(self) -> Any:
        """What its file holds."""
        return json.loads((self.folder / "alone.json").read_text())

    @property
    def option(self) -> str:
        """The `--additional-config` that it printed."""
        [line] = [line for line in self.printed.splitlines() if line.startswith("use it")]
        return shlex.split(line)[-1]


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Calibrated:
    folder = tmp_path_factory.mktemp("calibrated")
    model = checkpoints.write(folder / "model", "LlamaConfig")
    checkpoints.write_tokenizer(model)
    (folder / "text").write_text(" ".join(f"{n * n % 997}" for n in range(600)))
    steps: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worked_out, "calibrate", _counting(steps, worked_out.calibrate))
        result = _calibrated(*arguments(folder, folder / "alone.json"))
    return Calibrated(folder, result.stdout, steps)


def _counting(steps: list[int], calibrate: Callable[..., Any]) -> Callable[..., Any]:
    def counted(*args: Any) -> Any:
        *others, seen = args
        return calibrate(*others, lambda count: (steps.append(count), seen(count)))

    return counted


def test_budgets_keep_what_was_asked(calibrated: Calibrated) -> None:
    config = calibrated.budgets
    budgets = read_budgets(config, [0, 1], 4)
    recalls = [entry[3] for layer in config for entry in layer.values()]
    assert RECALL <= min(recalls) < max(recalls) < 1
    # The smallest pair does not suffice for all heads, and nor are all keys needed.
    pairs = {pair for layer in budgets for pair in layer}
    assert len(pairs) > 2
    assert all(s < LENGTH - 1 for _, s in pairs)
    # What a head keeps differs in its rounding only, and no two heads keep the same.
    assert len({*recalls}) > len(recalls) // 2
    assert f'"sparse_budgets": "{calibrated.folder / "alone.json"}"' in calibrated.printed
    assert "chunk_size 512 is over the model's window of 128 tokens" in calibrated.printed
    # Budgets belong to these chunks.
    assert json.dumps(SIZES)[1:-1] in calibrated.printed


def test_each_step_is_told_of(calibrated: Calibrated) -> None:
    assert calibrated.steps == [2, 2]


def test_two_ranks_find_the_same(calibrated: Calibrated) -> None:
    """Each has two of the heads."""
    output = calibrated.folder / "two.json"
    ranks = ("--tensor-parallel-size", "2")
    _calibrated(*arguments(calibrated.folder, output), *ranks, **one_core_each())
    of_two = json.loads(output.read_text())
    for layer, right in zip(of_two, calibrated.budgets, strict=True):
        assert {head: entry[:3] for head, entry in layer.items()} == {
            head: entry[:3] for head, entry in right.items()
        }
        for head, entry in layer.items():
            assert entry[3] == pytest.approx(right[head][3], abs=2e-4)


def test_who_serves_with_them_keeps_as_much(calibrated: Calibrated) -> None:
    """On the same text in the same steps, by the option that was printed."""
    rows = _rows(calibrated.printed)
    for layer, (recalls, keys) in enumerate(_served(calibrated)):
        budgets = calibrated.budgets[layer]
        assert recalls.tolist() == pytest.approx(
            [budgets[str(head)][3] for head in range(4)], abs=2e-4
        )
        mean, least, kept = map(float, rows[str(layer)])
        assert recalls.mean().item() == pytest.approx(mean, abs=6e-4)
        assert recalls.min().item() == pytest.approx(least, abs=6e-4)
        assert keys.mean().item() == pytest.approx(kept, abs=6e-4)


def _served(calibrated: Calibrated) -> list[torch.Tensor]:
    """What each layer keeps of attention and of keys, [2, num_heads], the mean of its segments.

    Those before it are dense meanwhile, as they were when its budgets were found.
    """
    from transformers import AutoTokenizer

    model = calibrated.folder / "model"
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokens = tokenizer.encode((calibrated.folder / "text").read_text())[: LENGTH - 1]
    options = {
        "additional_config": json.loads(calibrated.option),
        "max_model_len": LENGTH,
        "max_num_batched_tokens": STEP,
        "enable_prefix_caching": False,
    }
    kept = []
    with engine(model, **options) as llm:
        for impl in _attention(llm):
            segments: list[torch.Tensor] = []
            _watch(impl, segments)
            generate(llm, [tokens])
            assert len(segments) == 2
            kept.append(torch.stack(segments).mean(0))
            rule = impl.sparse.rule
            impl.sparse.rule = rule._replace(slashes=torch.full_like(rule.slashes, LENGTH))
    return kept


def _attention(llm: Any) -> list[Any]:
    """DCA's, in the order of the layers."""
    layers = runner_of(llm).compilation_config.static_forward_context.values()
    return [layer.impl for layer in layers if isinstance(layer.impl, DcaImpl)]


def _watch(impl: Any, segments: list[torch.Tensor]) -> None:
    """Note what it keeps in each."""

    def look(attended: Attended) -> None:
        segments.append(torch.stack(attended.kept(attended.lines)))

    impl.sparse.watch, impl.sparse.sampler.every = look, 1


def _rows(printed: str) -> dict[str, list[str]]:
    """Of the printed table, by their first column."""
    cells = [
        [cell.strip() for cell in line.strip("│┃ ").replace("┃", "│").split("│")]
        for line in printed.splitlines()
        if line[:1] in ("│", "┃")
    ]
    return {name: others for name, *others in cells}


def _calibrated(*words: str, status: int = 0, **environment: str) -> Result:
    """In this process, which is left as it was."""
    from vllm.distributed import cleanup_dist_env_and_memory

    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", **environment}.items():
            patch.setenv(name, value)
        try:
            result = run(*words)
        finally:
            cleanup_dist_env_and_memory()
    assert result.exit_code == status, result.output
    return result


def test_a_short_text_is_refused(calibrated: Calibrated, tmp_path: Path) -> None:
    """It passes the threshold, but not by the 256 tokens of a segment."""
    (tmp_path / "text").write_text("x" * 400)
    output = tmp_path / "budgets.json"
    words = arguments(calibrated.folder, output)
    result = _calibrated(*words, "--text", str(tmp_path / "text"), status=1)
    assert "text has 400 tokens for this model, of which no step was sparse" in result.stderr
    assert "give a longer text" in result.stderr
    assert not output.exists()


def test_of_a_grid_s_pairs_the_fewest_keys_that_suffice() -> None:
    """In the mean of two segments: else the most attention, and of equals the first pair."""
    grid = Grid(300)
    assert grid.pairs == [(v, s) for v in (32, 128) for s in (128, 256, 300)]
    recalls = [
        [0.50, 0.25, 0.75, 0.500],
        [0.75, 0.50, 0.75, 0.625],
        [1.00, 0.25, 0.75, 0.750],
        [0.50, 0.25, 1.00, 0.125],
        [0.75, 0.50, 1.00, 0.625],
        [1.00, 0.25, 1.00, 1.000],
    ]
    keys = [
        [0.125, 0.125, 0.500, 0.250],
        [0.500, 0.500, 0.250, 0.125],
        [0.750, 0.750, 0.500, 0.750],
        [0.125, 0.125, 0.250, 0.125],
        [0.250, 0.250, 0.500, 0.125],
        [0.500, 0.500, 0.500, 0.750],
    ]
    grid.segments = 2
    grid.totals = [
        (2 * torch.tensor(kept), 2 * torch.tensor(share))
        for kept, share in zip(recalls, keys, strict=True)
    ]
    assert grid.budgets(0.75) == [
        Budget(128, 256, 0.75, 0.25),
        Budget(32, 256, 0.5, 0.5),
        Budget(32, 256, 0.75, 0.25),
        Budget(32, 300, 0.75, 0.75),
    ]


def _found(*args: Any) -> dict[int, list[Budget]]:
    """As `calibrate`, of four steps; layers 1 and 2 are not DCA's."""
    seen = args[-1]
    for _ in range(4):
        seen(4)
    return {
        0: [Budget(32, 128, 0.875, 0.125), Budget(32, 256, 0.625, 0.25)],
        3: [Budget(128, 128, 0.896, 0.5), Budget(128, 1199, 0.9, 0.75)],
    }


def test_a_table_says_what_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worked_out, "calibrate", _found)
    (tmp_path / "text").write_text("long")
    words = arguments(tmp_path, tmp_path / "budgets.json")
    result = run(*words, "--recall", "0.9")
    assert result.exit_code == 0, result.output
    assert _rows(result.stdout) == {
        "layer": ["attention kept", "least of a head", "keys kept"],
        "0": ["0.750", "0.625", "0.188"],
        "3": ["0.898", "0.896", "0.625"],
        "all": ["0.824", "0.625", "0.406"],
    }
    assert "3 of 4 heads keep less than 0.9, whatever the budget" in result.stdout
    assert json.loads((tmp_path / "budgets.json").read_text()) == [
        {
            "0": ["vertical_and_slash", 32, 128, 0.875],
            "1": ["vertical_and_slash", 32, 256, 0.625],
        },
        {},
        {},
        {
            "0": ["vertical_and_slash", 128, 128, 0.896],
            "1": ["vertical_and_slash", 128, 1199, 0.9],
        },
    ]


def test_heads_that_keep_enough_are_not_counted(calibrated: Calibrated) -> None:
    assert "whatever the budget" not in calibrated.printed


def test_a_bar_shows_how_far_the_reading_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worked_out, "calibrate", _found)
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    command.run("model", tmp_path / "text", RECALL, tmp_path / "budgets.json", {}, console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert shown.index("Starting the engine") < shown.index("Reading the text")
    assert "100%" in shown


@pytest.mark.parametrize(
    ("wrong", "status", "message"),
    [
        (("--text", "no-such-file"), 2, "--text"),
        (("--text", "."), 2, "--text"),
        (("--output", "."), 2, "--output"),
        (("--output", "no-such-folder/budgets.json"), 2, "--output"),
        (("--output", "/proc/budgets.json"), 2, "--output"),
        (("--recall", "0.09"), 2, "--recall"),
        (("--recall", "1.01"), 2, "--recall"),
        (("--additional-config", '{"dca": []}'), 1, '"dca" must be an object'),
        (("--additional-config", "[1]"), 2, "--additional-config"),
        (("--text", "latin-1"), 1, "latin-1 is not UTF-8 text"),
    ],
)
def test_what_cannot_work_starts_no_engine(
    wrong: tuple[str, str],
    status: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "text").write_text("long")
    (tmp_path / "latin-1").write_bytes(b"\xe9")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("vllm_dca.engine.calibrate.LLM", _no_engine)
    result = run(*arguments(tmp_path, tmp_path / "budgets.json"), *wrong)
    assert result.exit_code == status
    assert message in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latin-1", "text"]


def _no_engine(*_: Any, **__: Any) -> None:
    raise AssertionError("an engine was started")


def test_an_engine_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        logger.warning("why it may")
        raise RuntimeError("Worker failed with error 'no room'")

    # As `calibrate` sets it for its process.
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    (tmp_path / "text").write_text("long")
    monkeypatch.setattr("vllm_dca.engine.calibrate.LLM", fail)
    result = run(*arguments(tmp_path, tmp_path / "budgets.json"))
    assert result.exit_code == 1
    assert result.stderr.strip() == "Worker failed with error 'no room'"
    assert "why it may" in result.stdout


def arguments(folder: Path, output: Path) -> list[str]:
    options = ("--recall", str(RECALL), "--output", str(output), "--text", str(folder / "text"))
    dca = ("--additional-config", json.dumps({"dca": SIZES}), "--dtype", "float32")
    sizes = ("--max-model-len", str(LENGTH), "--max-num-batched-tokens", str(STEP))
    return ["calibrate", str(folder / "model"), *sizes, *options, *dca]


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What an engine is asked for, which does not start."""
    found: dict[str, Any] = {}

    def llm(_: str, **options: Any) -> None:
        found.update(options)
        raise RuntimeError

    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setattr("vllm_dca.engine.calibrate.LLM", llm)
    return found


def test_an_engine_has_the_options_of_a_server(tmp_path: Path, given: dict[str, Any]) -> None:
    """But for those that a reading has no use for."""
    (tmp_path / "text").write_text("long")
    ngram = '{"method": "ngram", "num_speculative_tokens": 2}'
    words = ("--trust-remote-code", "--block-size", "32", "--hf-overrides", '{"a": 1}')
    words += ("--max-num-batched-tokens", "1K", "--port", "8001", "--speculative-config", ngram)
    assert run(*arguments(tmp_path, tmp_path / "budgets.json"), *words).exit_code == 1
    wanted = {"trust_remote_code": True, "block_size": 32, "max_num_batched_tokens": 1024}
    wanted |= {"hf_overrides": {"a": 1}, "speculative_config": None, "max_model_len": 1200}
    assert wanted.items() <= given.items()
    assert "port" not in given


def test_options_that_were_printed_may_be_given_again(
    calibrated: Calibrated, tmp_path: Path, given: dict[str, Any]
) -> None:
    """Budgets are found as if there were none yet, and replace those."""
    words = arguments(calibrated.folder, tmp_path / "budgets.json")
    result = run(*words, "--additional-config", calibrated.option)
    assert given, result.output
    dca = given["additional_config"]["dca"]
    assert SIZES.items() <= dca.items()
    assert dca["sparse"] == "auto"
    assert "sparse_budgets" not in dca
