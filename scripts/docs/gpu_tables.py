"""The tables of docs/gpu-kernels.md."""

from typing import Any

from scripts.docs.page import load, markdown


def balance() -> str:
    cards = load("balance")["busiest"]
    return markdown(
        ("busiest place / mean place", "median", "worst"),
        *(
            (card, *(f"{value:.2f}" for value in found.values()))
            for card, found in cards.items()
        ),
    )


def decode_bytes() -> str:
    return markdown(
        ("a layer's step, MB", "floor", "moved"),
        *(
            (step, *(f"{size / 1e6:,.1f}" for size in sizes.values()))
            for step, sizes in load("balance")["moved"].items()
        ),
    )


def _compiled(kernels: list[dict[str, Any]], **wanted: object) -> list[str]:
    """Registers, programs a multiprocessor, and KiB in flight there, for each capability.

    No more than two programs a multiprocessor are launched, whatever fits.
    """
    rows = [row for row in kernels if wanted.items() <= row.items()]
    assert [row["capability"] for row in rows] == [80, 90, 100], wanted
    programs = [row["programs_per_multiprocessor"] for row in rows]
    flights = [
        row["bytes_in_flight"] * min(n, 2) >> 10 for row, n in zip(rows, programs, strict=True)
    ]
    numbers = ([row["registers"] for row in rows], programs, flights)
    return [" / ".join(map(str, column)) for column in numbers]


def decode_kernels() -> str:
    """The decode kernel as compiled."""
    kernels = [row for row in load("kernels")["kernels"] if row["capability"] in (80, 90, 100)]
    rows = []
    for shape, group in (("SmolLM2-135M", 3), ("Llama-3-8B", 4), ("Gemma-like", 2)):
        for cache in ("bfloat16", "float8_e5m2"):
            wanted = {"shape": shape, "dtype": "bfloat16", "kv_cache": cache}
            found = _compiled(kernels, **wanted, kernel="decode_kernel, 16 queries")
            rows.append((f"{shape}, group of {group}", cache, *found))
    return markdown(("shape", "KV cache", "registers", "programs", "KiB in flight"), *rows)


def prefill_kernels() -> str:
    """One launch beside three passes and a merge, for 8.0 / 9.0 / 10.0."""
    keys = {
        "registers": "registers",
        "programs_per_multiprocessor": "programs",
        "shared_bytes": "shared memory, KiB",
        "loop_instructions": "instructions",
        "spilled_bytes": "spilled",
    }
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in load("prefill-kernels")["results"]:
        groups.setdefault((row["head_size"], row["kv_cache"], row["way"]), []).append(row)
    rows = []
    for group, of_cards in groups.items():
        assert [row["capability"] for row in of_cards] == [80, 90, 100], group
        first = of_cards[0]
        numbers = (
            [row[key] >> 10 if key == "shared_bytes" else row[key] for row in of_cards]
            for key in keys
        )
        cells = (" / ".join(map(str, column)) for column in numbers)
        moved = f"{first['handed_over_bytes'] / 1e6:,.0f}"
        rows.append((*group, *cells, first["launches"], moved))
    head = ("head size", "KV cache", "by", *keys.values(), "launches", "MB")
    return markdown(head, *rows)


def compiled_kernels() -> str:
    """What is on record, and what of it spills; a row has all of its cards and dtypes."""
    cases: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = {}
    for row in load("kernels")["kernels"]:
        dtypes = f"{row['dtype']} over {row['kv_cache']}"
        if row["kv_cache"] == row["dtype"]:
            dtypes = row["dtype"]
        key = (row["shape"], row.get("part", "dense"))
        cases.setdefault(key, {}).setdefault(dtypes, []).append(row)
    rows = []
    for (shape, part), of_dtypes in cases.items():
        # Those that were compiled for the same cards.
        groups: dict[str, list[str]] = {}
        for dtypes, kernels in of_dtypes.items():
            cards = sorted({row["capability"] for row in kernels})
            named = ", ".join(f"{card // 10}.{card % 10}" for card in cards)
            groups.setdefault(named, []).append(dtypes)
        for named, those in groups.items():
            kernels = [row for dtypes in those for row in of_dtypes[dtypes]]
            spilled = sum(bool(row["spilled_bytes"]) for row in kernels)
            commits = ", ".join(dict.fromkeys(row["commit"][:7] for row in kernels))
            rows.append((shape, part, named, ", ".join(those), len(kernels), spilled, commits))
    head = ("shape", "part", "compute capability", "dtype (over another's KV cache)")
    return markdown((*head, "kernels", "that spill", "of commits"), *rows)
