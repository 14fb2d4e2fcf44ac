"""Processes that are killed under load, and a KV cache that is full."""

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil

from scripts.common.server import Server
from scripts.load.faults.served import (
    ANSWER,
    PROMPTS,
    Facts,
    answers,
    ask,
    require,
    serving,
    status_at_the_end,
)

LONG = 6000  # tokens of an answer that a kill cuts off
DEADLINE_S = 60
# A worker goes through all of its objects before it ends: half a minute on a core that is busy.
ORPHANS_S = 120
BLOCK = 16
# All prompts need 113 blocks. vLLM lets in those that fit, whatever their answers will need, so
# these must outgrow the cache: the longest prompt takes 25 blocks, so those in the cache take
# more than 59 - 25 when the next one finds no room, and they are two at least.
FEW_BLOCKS = 60  # one is vLLM's own
GROWING = 15 * BLOCK  # tokens of an answer


def alone(model: Path) -> list[list[int]]:
    """What a server answers that nothing happens to."""
    with serving(model) as served:
        return answers(served)


def kill_under_load(served: Server, name: str) -> Facts:
    """Kill its process of this name as all clients wait, and see what comes of it."""
    with ThreadPoolExecutor(len(PROMPTS)) as threads:
        clients = [threads.submit(ask, served, prompt, LONG) for prompt in PROMPTS]
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
    status = status_at_the_end(served)
    ended = time.monotonic() - killed
    _, left = psutil.wait_procs(children, ORPHANS_S)
    require(not left, f"left behind: {left}")
    gone = time.monotonic() - killed
    return {
        "clients": f"{len(statuses)} of {len(statuses)} got an error, in {told:.1f} s",
        "statuses": statuses,
        "server": f"ended with status {status} after {ended:.1f} s, "
        f"its last process after {gone:.1f} s",
    }


def killed(model: Path, expected: list[list[int]], name: str) -> Facts:
    with serving(model) as served:
        found = kill_under_load(served, name)
    with serving(model) as served:
        require(answers(served) == expected, "a restart answers otherwise")
    return {**found, "afterwards": "a restart answers as before"}


def engine_killed(model: Path, expected: list[list[int]]) -> Facts:
    """The engine core is killed under load."""
    return killed(model, expected, "VLLM::EngineCore")


def worker_killed(model: Path, expected: list[list[int]]) -> Facts:
    """A worker is killed under load."""
    return killed(model, expected, "VLLM::Worker")


def cache_full(model: Path, expected: list[list[int]]) -> Facts:
    """The KV cache has no room for what is asked at once."""
    room = (FEW_BLOCKS - 1) * BLOCK
    few = f"--num-gpu-blocks-override={FEW_BLOCKS}", f"--max-model-len={room}"
    # Else what a preempted request lost might still be found.
    with serving(model, *few, "--no-enable-prefix-caching") as served:
        long = answers(served, GROWING)
        require([found[:ANSWER] for found in long] == expected, "alone it answers otherwise")
        for _ in range(3):
            require(answers(served, GROWING, together=True) == long, "it answers otherwise")
        preempted = int(served.metric("vllm:num_preemptions_total"))
    require(preempted, "no request had to make room")
    return {
        "clients": "answered, token for token as alone",
        "server": f"preempted {preempted} times, and serves on",
        "afterwards": "",
    }
