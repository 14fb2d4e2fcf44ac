"""The tables of a server under load, and of what it does when something breaks."""

from collections import Counter
from typing import Any

from scripts.docs.page import load, markdown


def faults() -> str:
    found = [of["found"] for of in load("faults")["results"].values()]
    head = ("fault", "clients", "server", "afterwards")
    return markdown(head, *([of[key] for key in head] for of in found))


def soak() -> str:
    return _soak("soak")


def soak_full() -> str:
    return _soak("soak-full")


def _soak(record: str) -> str:
    servers = load(record)["servers"]
    counted = {name: _by_kind(of["requests"]) for name, of in servers.items()}
    kinds = dict.fromkeys(kind for of in counted.values() for kind in of)
    return markdown(
        ("", *servers),
        ("passes", *(of["passes"] for of in servers.values())),
        ("minutes", *(round(of["seconds"] / 60) for of in servers.values())),
        ("requests in all", *(of["requests_in_all"] for of in servers.values())),
        *((kind, *(of.get(kind, "") for of in counted.values())) for kind in kinds),
        (
            "largest difference of a log-probability",
            *(f"{of['texts']['largest_difference_of_logprob']:.1e}" for of in servers.values()),
        ),
        ("tokens generated for nobody", *(_for_nobody(of) for of in servers.values())),
        ("memory of either half, MiB", *(_memory(of) for of in servers.values())),
        ("violations", *(len(of["violations"]) for of in servers.values())),
    )


def _by_kind(requests: dict[str, int]) -> dict[str, str]:
    """From "kind, variant: how it ended" to the sums by how they ended."""
    sums: dict[str, Counter[str]] = {}
    for what, number in requests.items():
        kind, _, how = what.rpartition(": ")
        how = f"with status {how}" if how.isdigit() else how
        sums.setdefault(kind.partition(",")[0], Counter())[how] += number
    return {
        kind: ", ".join(f"{number} {how}" for how, number in of.items())
        for kind, of in sums.items()
    }


def _for_nobody(of: dict[str, Any]) -> str:
    return f"{of['tokens_for_clients_that_hung_up']:.0f}"


def _memory(of: dict[str, Any]) -> str:
    form = "{first_settled_mib:,} (peak {first_peak_mib:,}), then {second_settled_mib:,} "
    return (form + "(peak {second_peak_mib:,})").format(**of["memory"])


def soak_rounds() -> str:
    """Each kind of round in the first half of the passes and in the second."""
    rows = []
    for name, of in load("soak-full")["servers"].items():
        a_pass = len(of["bench"]) // of["passes"]
        half = of["passes"] // 2 * a_pass
        for number in range(a_pass):
            first, second = (
                of["bench"][number:half:a_pass],
                of["bench"][half + number :: a_pass],
            )
            middle, spread = first[0]["input_len"], first[0]["spread"]
            rows.append(
                (
                    name,
                    first[0]["concurrency"],
                    f"{middle * (1 - spread):,.0f} to {middle * (1 + spread):,.0f}",
                    _halves(first, second, "total_token_throughput", 1, "{:.0f}"),
                    _halves(first, second, "median_ttft_ms", 1e3, "{:.2f} s"),
                    _halves(first, second, "median_itl_ms", 1, "{:.0f} ms"),
                )
            )
    head = ("server", "at once", "prompts", "tokens/s", "first token", "between tokens")
    return markdown(head, *rows)


def _halves(
    first: list[dict[str, Any]], second: list[dict[str, Any]], key: str, unit: float, form: str
) -> str:
    means = (sum(bench[key] for bench in half) / len(half) / unit for half in (first, second))
    return ", then ".join(form.format(mean) for mean in means)
