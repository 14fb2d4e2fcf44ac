"""scripts/bench/first_answer.py knows a phase by the line with which it begins."""

from scripts.bench.first_answer import Phases

# As scripts/setup, scripts/serve and vLLM print them, so far.
LINES = (
    "Installing torch 2.13.0 for the CPU (200 MB)\n",
    "Installing vLLM 0.32.0 (some minutes, 200 MB)\n",
    "(EngineCore pid=7) INFO 11-29 [core.py:133] Initializing a V1 LLM engine (v0.32.0)\n",
)


def test_phases_follow_each_other() -> None:
    phases = Phases("clone")
    for number in range(len(LINES) + 1):
        phases.begin_those_of("".join(LINES[:number]) + "Installing uv, which is no phase\n")
    found = phases.found()
    assert [*found] == ["clone", "torch", "vLLM and what it needs", "vLLM's engine process"]
    assert all(of["seconds"] >= 0 and of["megabytes"] >= 0 for of in found.values())
