"""A server's memory and metrics while it is loaded, and what must be true in the end."""

import asyncio
import re
import time
from collections import Counter
from typing import Any

import psutil

from scripts.load.soak.traffic import LEFT, Traffic

GROWTH_MIB = 64  # of the settled level from the first half of the passes to the second
HELD = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
PREFIXES_FOUND = "vllm:prefix_cache_hits_total"
DRAFTS_TAKEN = "vllm:spec_decode_num_accepted_tokens_total"
KEPT = (
    r"vllm:(request_success|num_preempt|num_requests_r|num_requests_waiting$|kv_cache_u"
    r"|prefix_cache_(hits|queries)_|prompt_tokens_total|spec_decode_num_(draft|accepted)_t).*"
    r"|vllm_dca:.*_total"
)


class Memory:
    """Resident sizes of a server's processes, once a second.

    Attributes:
        samples: seconds from the start, and MiB of each process.
        ends_of_passes: how many samples there were.
    """

    def __init__(self, server: psutil.Process) -> None:
        self.processes = [server, *server.children(recursive=True)]
        self.samples: list[tuple[float, list[float]]] = []
        self.ends_of_passes: list[int] = []

    async def watch(self) -> None:
        """Until it is cancelled. A process that ends is an error."""
        start = time.monotonic()
        while True:
            resident = [process.memory_info().rss / 2**20 for process in self.processes]
            self.samples.append((time.monotonic() - start, resident))
            await asyncio.sleep(1)

    def of_halves(self) -> dict[str, Any]:
        """Of all processes together, in the first half of the passes and in the rest.

        A peak hangs on which requests met. A settled level is the lowest of the last quarter.
        """
        middle = self.ends_of_passes[len(self.ends_of_passes) // 2 - 1]
        curve = [sum(mib) for _, mib in self.samples]
        first, second = curve[:middle], curve[middle:]
        return {
            "bound_of_growth_mib": GROWTH_MIB,
            "first_peak_mib": round(max(first)),
            "second_peak_mib": round(max(second)),
            "first_settled_mib": round(_settled(first)),
            "second_settled_mib": round(_settled(second)),
            "curve_s_mib_of_each_process": [
                [round(t), *map(round, mib)]
                for t, mib in self.samples[:: len(self.samples) // 60 + 1]
            ],
        }


def _settled(curve: list[float]) -> float:
    return min(curve[len(curve) * 3 // 4 :])


async def drained(traffic: Traffic) -> Counter[str]:
    """The metrics when nothing is in flight, or after a minute."""
    for _ in range(60):
        found = await traffic.client.metrics()
        if not any(found[f"vllm:{name}"] for name in HELD):
            break
        await asyncio.sleep(1)
    for name in HELD:
        value = found[f"vllm:{name}"]
        traffic.expect(value == 0, f"{name} is {value} a minute after the load")
    return found


async def check_end(traffic: Traffic, memory: Memory, speculating: bool) -> dict[str, Any]:
    """What is left when the load is over; adds to the traffic's violations."""
    metrics = await drained(traffic)
    traffic.expect(metrics[PREFIXES_FOUND] > 0, "no prefix was found in the cache")
    taken = metrics[DRAFTS_TAKEN]
    traffic.expect((taken > 0) == speculating, f"{taken:.0f} drafts were taken")
    served = sum(bench["total_output_tokens"] for bench in traffic.benches)
    for_nobody = metrics["vllm:generation_tokens_total"] - served - traffic.client.generated
    clients = traffic.hung_up()
    traffic.expect(
        for_nobody < clients * LEFT / 10,
        f"{for_nobody:.0f} tokens for {clients} clients that had hung up",
    )
    question, alone = traffic.lone[0]
    again = await traffic.client.answer(question, "at the end")
    same = traffic.is_expected([alone], again["choices"])
    traffic.expect(same, f"in the end it answers {again}")
    health = await traffic.client.health()
    traffic.expect(health == 200, f"/health is {health} in the end")
    halves = memory.of_halves()
    growth = halves["second_settled_mib"] - halves["first_settled_mib"]
    traffic.expect(growth <= GROWTH_MIB, f"the processes grew by {growth} MiB")
    return {
        "tokens_for_clients_that_hung_up": for_nobody,
        "memory": halves,
        "metrics": {
            name: value
            for name, value in metrics.items()
            if re.fullmatch(KEPT, name) and "_created" not in name
        },
    }
