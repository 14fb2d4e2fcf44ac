"""The tables of a server under load, and of what it does when something breaks."""

from itertools import groupby
from typing import Any

from scripts.docs.page import load, markdown


def faults() -> str:
    found = [of["found"] for of in load("faults")["results"].values()]
    head = ("fault", "clients", "server", "afterwards")
    return markdown(head, *([of[key] for key in head] for of in found))


def soak() -> str:
    record = load("soak")
    rows = []
    for what, kinds in groupby(record["requests"].items(), lambda of: of[0].partition(", ")[0]):
        counts = ", ".join(f"{n} {kind.rpartition(': ')[2]}" for kind, n in kinds)
        rows.append((what.partition(":")[0], counts))
    return markdown(("", "requests"), ("in all", record["requests_in_all"]), *rows)


def soak_rounds() -> str:
    """Each kind of round in the first half of the passes and in the second."""
    record = load("soak")
    benches = record["bench"]
    a_pass = len(benches) // record["passes"]
    half = record["passes"] // 2 * a_pass
    rows = []
    for number in range(a_pass):
        first, second = benches[number:half:a_pass], benches[half + number :: a_pass]
        low, high = (
            first[0]["input_len"] * (1 + sign * first[0]["spread"]) for sign in (-1, 1)
        )
        rows.append(
            (
                first[0]["concurrency"],
                f"{low:,.0f} to {high:,.0f}",
                *_halves(first, second, "total_token_throughput", 1, "{:.0f}"),
                *_halves(first, second, "median_ttft_ms", 1e3, "{:.2f} s"),
                *_halves(first, second, "median_itl_ms", 1, "{:.0f} ms"),
            )
        )
    head = ("at once", "prompts", "tokens/s", "first token", "between tokens")
    return markdown(head, *rows)


def _halves(
    first: list[dict[str, Any]], second: list[dict[str, Any]], key: str, unit: float, form: str
) -> list[str]:
    means = (sum(bench[key] for bench in half) / len(half) / unit for half in (first, second))
    return [", then ".join(form.format(mean) for mean in means)]
