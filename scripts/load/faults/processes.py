"""Processes that are killed under load, and a KV cache that is full."""

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil

from scripts.load.faults.served import PROMPTS, Facts, Served, require, serving

LONG = 6000  # tokens of an answer that a kill cuts off
DEADLINE_S = 60
# 16 tokens each; all prompts with their answers need twice as many.
FEW_BLOCKS = 60


def alone(model: Path) -> list[list[int]]:
    """What a server answers that nothing happens to."""
    with serving(model) as served:
        return served.answers()


def kill_under_load(served: Served, name: str) -> Facts:
    """Kill its process of this name as all clients wait, and see what comes of it."""
    with ThreadPoolExecutor(len(PROMPTS)) as threads:
        clients = [threads.submit(served.ask, prompt, LONG) for prompt in PROMPTS]
        deadline = time.monotonic() + DEADLINE_S
        while served.metric("vllm:num_requests_running") < len(PROMPTS):
            require(time.monotonic() < deadline, "the load is not there")
            require(
                not any(client.done() for client in clients), "a client was answered before"
            )
            time.sleep(0.05)
        children = served.children()
        victims = served.children(name)
        require(len(victims) == 1, f"{len(victims)} processes {name}")
        os.kill(victims[0].pid, signal.SIGKILL)
        killed = time.monotonic()
        statuses = sorted(client.result(DEADLINE_S)[0] for client in clients)
        told = time.monotonic() - killed
    require(200 not in statuses, f"statuses {statuses}")
    status = served.wait_for_the_end()
    ended = time.monotonic() - killed
    _, left = psutil.wait_procs(children, 30)
    require(not left, f"left behind: {left}")
    return {
        "clients": f"{len(statuses)} of {len(statuses)} got an error, in {told:.1f} s",
        "statuses": statuses,
        "server": f"ended with status {status} after {ended:.1f} s, no process left",
    }


def killed(model: Path, expected: list[list[int]], name: str) -> Facts:
    with serving(model) as served:
        found = kill_under_load(served, name)
    with serving(model) as served:
        require(served.answers() == expected, "a restart answers otherwise")
    return {**found, "afterwards": "a restart answers as before"}


def engine_killed(model: Path, expected: list[list[int]]) -> Facts:
    """The engine core is killed under load."""
    return killed(model, expected, "VLLM::EngineCore")


def worker_killed(model: Path, expected: list[list[int]]) -> Facts:
    """A worker is killed under load."""
    return killed(model, expected, "VLLM::Worker")


def cache_full(model: Path, expected: list[list[int]]) -> Facts:
    """The KV cache has no room for what is asked at once."""
    # One block is vLLM's own.
    longest = (FEW_BLOCKS - 1) * 16
    few = f"--num-gpu-blocks-override={FEW_BLOCKS}", f"--max-model-len={longest}"
    with serving(model, *few) as served:
        for _ in range(3):
            require(served.answers(together=True) == expected, "it answers otherwise")
        preempted = int(served.metric("vllm:num_preemptions_total"))
    require(preempted, "no request had to make room")
    return {
        "clients": "answered, token for token as alone",
        "server": f"preempted {preempted} times, and serves on",
        "afterwards": "",
    }
