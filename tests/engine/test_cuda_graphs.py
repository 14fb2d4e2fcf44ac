"""CUDA graphs where Model Runner V2 captures them: a stand-in, replayed for other batches."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import checkpoints, graphs, rehearsal
from tests.helpers.answers import generate
from tests.helpers.companions import write_eagle
from tests.helpers.inprocess import engine, runner_of
from tests.helpers.model_runner_v2 import capturing
from tests.helpers.rehearsal import assert_agrees
from tests.helpers.runners import under

OPTIONS = {**rehearsal.OPTIONS, "max_num_batched_tokens": 32}


def test_a_graph_keeps_what_the_host_worked_out_and_reads_memory_anew() -> None:
    length, memory = 3, torch.arange(8.0)
    graph = graphs.Graph()
    with graphs.graph(graph):
        doubled = memory[:length] * 2
        result = torch.empty(3)
        result[:2] = doubled[:2]
    memory += 1
    length += 1
    graph.replay()
    assert doubled.tolist() == [2, 4, 6]
    assert result[:2].tolist() == [2, 4]
    assert result.isnan().tolist() == [False, False, True]
    with graphs.graph(graphs.Graph()), pytest.raises(AssertionError, match="waits for the dev"):
        memory.max().item()


@under("V2")
def test_replays_of_other_batches(tmp_path: Path) -> None:
    """Over chunk borders (32, 64), in other pages, three requests in a graph of four."""
    llama = checkpoints.write(tmp_path, "LlamaConfig")
    prompts = [checkpoints.tokens(length, length) for length in (30, 61, 5)]
    again = [prompts[1][:40], checkpoints.tokens(47)]
    with capturing([2, 4, 32]), engine(llama, **OPTIONS) as llm:
        steps = noted(llm)
        outputs = generate(llm, prompts, max_tokens=6)
        outputs += generate(llm, again, max_tokens=3)
        assert graphs.Graph.replays > 0
    for prompt, output in zip(prompts + again, outputs, strict=True):
        assert_agrees(llama, prompt, output)
    assert {("FULL", 3, 3, 4), ("FULL", 2, 2, 2)} <= set(steps)
    assert {mode for mode, *_ in steps} == {"FULL", "PIECEWISE"}


@under("V2")
def test_drafts_of_a_step_are_one_graph(tmp_path: Path) -> None:
    """As without graphs, and as when the host plans each draft; and verified by another one."""
    llama = checkpoints.write(tmp_path / "llama", "LlamaConfig")
    head = write_eagle(tmp_path / "head", "eagle")
    draft = {"method": "eagle", "model": str(head), "num_speculative_tokens": 3}
    options = {**OPTIONS, "speculative_config": draft}
    prompts = [checkpoints.tokens(length, length) for length in (60, 29, 5)]
    found = []
    with engine(llama, **options) as llm:
        speculator = runner_of(llm).speculator
        assert speculator.supports_decode_metadata_update
        for at_once in (True, False):
            speculator.supports_decode_metadata_update = at_once
            llm.reset_prefix_cache()
            proposals = proposed(speculator)
            generate(llm, prompts, max_tokens=5)
            found.append(proposals)
    with capturing([4, 16, 32]), engine(llama, **options) as llm:
        steps = noted(llm)
        speculator = runner_of(llm).speculator
        drafts = noted_by(speculator.decode_cudagraph_manager)
        proposals = proposed(speculator)
        outputs = generate(llm, prompts, max_tokens=5)
        found.append(proposals)
    for prompt, output in zip(prompts, outputs, strict=True):
        assert_agrees(llama, prompt, output)
    assert found[0]
    assert found[0] == found[1] == found[2]
    assert ("FULL", 3, 12, 16) in steps
    assert ("FULL", 3, 3, 4) in drafts


def noted(llm: Any) -> list[tuple[str, int, int, int]]:
    """How each step of the model runs from now on, see `noted_by`."""
    return noted_by(runner_of(llm).cudagraph_manager)


def noted_by(manager: Any) -> list[tuple[str, int, int, int]]:
    """The graphs' kind, requests, tokens, and tokens with padding."""
    dispatch, found = manager.dispatch, []

    def and_note(num_reqs: int, num_tokens: int, *args: Any, **kwargs: Any) -> Any:
        chosen = dispatch(num_reqs, num_tokens, *args, **kwargs)
        found.append((chosen.cg_mode.name, num_reqs, num_tokens, chosen.num_tokens))
        return chosen

    manager.dispatch = and_note
    return found


def proposed(speculator: Any) -> list[list[list[int]]]:
    """What is drafted from now on, step by step."""
    propose, found = type(speculator).propose, []

    def and_note(*args: Any, **kwargs: Any) -> torch.Tensor:
        drafts = propose(speculator, *args, **kwargs)
        found.append(drafts.tolist())
        return drafts

    speculator.propose = and_note
    return found
