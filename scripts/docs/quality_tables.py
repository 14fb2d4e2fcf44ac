"""The tables of what a model answers: perplexity, retrieval, RULER, sparse prefill's loss."""

from typing import Any

from scripts.docs.page import SPARSE_LENGTHS, load, markdown
from scripts.docs.ruler import rows as ruler_rows
from scripts.quality import loss
from scripts.quality.methods import name_of
from scripts.quality.windows import by_length

TITLES = {"pride-and-prejudice": "*Pride and Prejudice*", "opticks": "*Opticks*"}


def demo() -> str:
    record = load("demo")
    plain, dca = (record["results"][name] for name in ("plain", "dca"))
    return markdown(
        (f"{record['tokens']:,} tokens of *Pride and Prejudice*", "plain RoPE", "DCA"),
        (
            "perplexity at the end of the window",
            f"{plain['inside']:.1f}",
            f"{dca['inside']:.1f}",
        ),
        ("perplexity at the end of the text", f"{plain['beyond']:.1f}", f"{dca['beyond']:.1f}"),
        ('"The code word for the vault is ..."', f'"{plain["answer"]}"', f'"{dca["answer"]}"'),
    )


def perplexity() -> str:
    results = load("perplexity")["results"]
    lengths = [int(length) for length in results["plain"]["perplexity"]]
    return markdown(
        ("tokens read", *(f"{length:,}" for length in lengths)),
        *(
            (name_of(label), *(f"{value:,.1f}" for value in found["perplexity"].values()))
            for label, found in results.items()
        ),
    )


def retrieval() -> str:
    results = load("retrieval")["results"]
    answers = [answer for of in results["plain"]["answers"].values() for answer in of]
    lengths = [int(length) for length in results["plain"]["accuracy"]]
    asked = (sum(answer["length"] == length for answer in answers) for length in lengths)
    return markdown(
        ("tokens read", *(f"{length:,}" for length in lengths)),
        *(
            (name_of(label), *(f"{share:.0%}" for share in found["accuracy"].values()))
            for label, found in results.items()
        ),
        ("questions", *asked),
    )


def twice() -> str:
    """YaRN set for the length at hand, beside what was set for four windows."""
    shorter, longer = (load(name)["results"] for name in ("twice-perplexity", "perplexity"))
    rows = {
        "DCA": longer["dca"],
        "YaRN, factor 2.125": shorter["yarn"],
        "YaRN, factor 4.125": longer["yarn"],
    }
    ends = [*shorter["yarn"]["perplexity"]]
    return markdown(
        ("tokens read", *(f"{int(end):,}" for end in ends)),
        *(
            (name, *(f"{of['perplexity'][end]:.1f}" for end in ends))
            for name, of in rows.items()
        ),
    )


def ruler() -> str:
    return markdown(*ruler_rows())


def sizes() -> str:
    prose, numbers = (load(f"sizes-{what}")["results"] for what in ("perplexity", "retrieval"))
    read = [f"perplexity, {int(end):,}" for end in prose["dca"]["perplexity"]]
    found = [f"found, {int(end):,}" for end in numbers["dca"]["accuracy"]]
    return markdown(
        ("", *read, *found),
        *(
            (
                label.partition(":")[2].replace(",", ", ") or "derived: 6144 / 1024",
                *(f"{value:.1f}" for value in prose[label]["perplexity"].values()),
                *(f"{value:.0%}" for value in numbers[label]["accuracy"].values()),
            )
            for label in prose
        ),
    )


def windows() -> str:
    record = load("windows")
    return _windows(record["lengths"], record["results"], [*TITLES])


def eight_windows() -> str:
    """Beside as much of what DCA read to sixteen."""
    record = load("windows-65k")
    others = record["results"]
    works = [work for work in TITLES if any(work in of for of in others.values())]
    derived = load("windows")["results"]["dca"]
    return _windows(record["lengths"], {"dca": derived, **others}, works)


def _windows(ends: list[int], results: dict[str, Any], works: list[str]) -> str:
    """Perplexity since the length before, and how many numbers were found."""

    def cells(read: dict[str, Any]) -> list[str]:
        of_ends = by_length([read], ends).values()
        return [f"{score:,.1f}; {found} of {asked}" for score, found, asked in of_ends]

    return markdown(
        ("text", "method", *(f"{end:,}" for end in ends)),
        *(
            (TITLES[work], name_of(label), *cells(of_works[work]))
            for work in works
            for label, of_works in results.items()
            if work in of_works
        ),
    )


def sparse_quality() -> str:
    rows = [
        (length, label, of)
        for length in SPARSE_LENGTHS
        for label, of in loss.losses(load(f"sparse-quality-{length}")["results"]).items()
    ]

    def shown(share: float | None) -> str:
        return "" if share is None else f"{share:.2f}"

    return markdown(
        (
            "tokens",
            "keys",
            "texts",
            "perplexity",
            "found",
            "kept",
            "recall",
            "attention's time",
            "whole read, s",
        ),
        *(
            (
                *(length, label, of.texts),
                f"{of.perplexity:.2f} ({of.more:+.1%})",
                f"{of.found} of {of.asked}; dense {of.dense_found}",
                *map(shown, (of.keys, of.recall, of.attention_time)),
                f"{of.seconds:,.0f} ({of.read_time:.2f})",
            )
            for length, label, of in sorted(rows, key=_by_keys)
        ),
    )


def _by_keys(row: tuple[str, str, loss.Loss]) -> tuple[int, bool, float]:
    """Densely, then the more keys the sooner; what stands beside for comparison last."""
    length, label, of = row
    return int(length.removesuffix("k")), label.startswith("window"), -(of.keys or 1)
