"""Write the tables of README.md and docs/ anew, from the records and from what is declared.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; NAME is a function below,
or one in `*_tables.py`.
"""

import re
import statistics
from collections import Counter
from collections.abc import Callable
from typing import Any

from scripts.common.record import ROOT
from scripts.docs import gpu_tables, load_tables, quality_tables, records, support_table
from scripts.docs.page import SPARSE_LENGTHS, load, markdown

DOCUMENTS = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
TABLE = re.compile(r"(?<=<!-- table: )(\w+) -->\n.*?(?=<!-- end -->)", re.DOTALL)


def _medians(row: dict[str, Any]) -> dict[str, str]:
    times = {name: f"{time['median']:.2f}" for name, time in row["milliseconds"].items()}
    times["spread"] = "{low:.2f} to {high:.2f}".format(**row["milliseconds"]["DCA"])
    return times


def _cpu(record: str) -> str:
    names = ("DCA", "spread", "CPU_ATTN", "DCA by torch")
    head = ("step", "shape", "dtype", "requests", "DCA / CPU_ATTN", "of the machine")
    return markdown(
        (*head, "DCA, ms", "quartiles", "CPU_ATTN, ms", "by torch, ms"),
        *(
            (
                *(row[key] for key in ("step", "shape", "dtype", "batch")),
                f"**{row['ratio']:.2f}**",
                f"{row['share']:.2f}",
                *(_medians(row).get(name, "") for name in names),
            )
            for row in load(record)["results"]
        ),
    )


def cpu() -> str:
    return _cpu("cpu")


def cpu_avx2() -> str:
    return _cpu("cpu-avx2")


def by_torch() -> str:
    times = [
        took["DCA by torch"]["median"] / took["DCA"]["median"]
        for record in ("cpu", "cpu-avx2")
        for row in load(record)["results"]
        if "DCA by torch" in (took := row["milliseconds"])
    ]
    return (
        f"`torch` takes {min(times):.1f} to {max(times):.1f} times as long in the rows "
        "[below](#one-layer) that have both.\n"
    )


def cpu_instructions() -> str:
    rows = load("cpu-instructions")["results"]
    names = list(rows[0]["milliseconds"])
    return markdown(
        ("step", "shape", *names),
        *(
            (
                row["step"],
                row["shape"],
                *(f"{row['milliseconds'][each]['median']:,.2f}" for each in names),
            )
            for row in rows
        ),
    )


def cpu_growth() -> str:
    head = ("tokens", "dtype", "requests", "chunk_len", "DCA / CPU_ATTN", "of a read")
    return markdown(
        (*head, "DCA, ms", "plan, ms"),
        *(
            (
                f"{row['context']:,}",
                *(row[key] for key in ("dtype", "batch", "chunk_len")),
                f"**{row['ratio']:.2f}**",
                f"{row['share']:.2f}",
                _medians(row)["DCA"],
                f"{row['plan_milliseconds_a_step']:.3f}",
            )
            for row in load("cpu-growth")["results"]
        ),
    )


def _engine(record: str) -> str:
    def milliseconds(of: dict[str, float]) -> str:
        median, low, high = (f"{of[key] * 1e3:.1f}" for key in ("median", "low", "high"))
        return f"{median} ({low} to {high})" if of["turns"] > 1 else median

    return markdown(
        ("", "DCA / CPU_ATTN", "DCA, ms (quartiles)", "CPU_ATTN, ms (quartiles)"),
        *(
            (what, f"**{of['ratio']:.2f}**", *map(milliseconds, of["seconds"].values()))
            for what, of in load(record)["results"].items()
        ),
    )


def engine() -> str:
    return _engine("engine-cpu")


def engine_avx2() -> str:
    return _engine("engine-cpu-avx2")


def first_answer() -> str:
    phases = load("first-answer")["phases"]
    received = sum(of["megabytes"] for of in phases.values())
    seconds = sum(of["seconds"] for of in phases.values())
    return markdown(
        ("phase", "s", "MB received"),
        *(
            (name, f"{of['seconds']:.1f}", f"{of['megabytes']:.0f}")
            for name, of in phases.items()
        ),
        ("**in all**", f"**{seconds:.0f}**", f"{received:.0f}"),
    )


def linear_memory() -> str:
    record = load("linear-memory")
    return markdown(
        ("", *(f"{number:,}" for number in record["numbers"])),
        *((way, *(f"{mib:,}" for mib in of)) for way, of in record["mebibytes"].items()),
    )


def sparse() -> str:
    rows = [row for name in ("sparse-32k", "sparse-128k") for row in load(name)["results"]]
    return markdown(
        (
            *("tokens", "shape", "dtype", "dense, ms", "selecting, auto"),
            *("selecting, checkpoint", "attending, by share of keys"),
        ),
        *(
            (
                f"{row['context']:,}",
                *(row["model"], row["dtype"], f"{row['dense_ms']:,.0f}"),
                *(f"{row['select'][mode]:.3f}" for mode in ("auto", "checkpoint")),
                ", ".join(f"{float(k):.2f}: {took:.3f}" for k, took in row["attend"].items()),
            )
            for row in rows
        ),
    )


def first_token() -> str:
    record = load("first-token-32k")
    seconds = {
        label: statistics.median(of["seconds"][str(record["lengths"][-1])])
        for label, of in record["results"].items()
    }
    return markdown(
        (f"{record['lengths'][-1]:,} tokens", "first token, s", "of dense"),
        *(
            (
                label.partition(":")[2].replace(",", ", ") or "dense",
                f"{took:.0f}",
                f"{took / seconds['dca']:.2f}",
            )
            for label, took in seconds.items()
        ),
    )


def model_counts() -> str:
    verdicts = Counter(of["verdict"] for of in load("models")["verdicts"].values())
    return markdown(("verdict", "models"), *verdicts.most_common())


def models() -> str:
    def why(of: dict[str, Any]) -> str:
        if "error" not in of:
            return str(of["reason"]).replace("|", "/")
        dtype = "" if of["dtype"] == "float32" else f", in {of['dtype']}"
        return f"off by {of['error']:.0e} of {of['tolerance']:.0e}{dtype}"

    verdicts = load("models")["verdicts"]
    order = list(Counter(of["verdict"] for of in verdicts.values()))
    rows = sorted(verdicts.items(), key=lambda row: order.index(row[1]["verdict"]))
    return markdown(
        ("architecture", "verdict", "how far off, or why"),
        *((f"`{name}`", of["verdict"], why(of)) for name, of in rows),
    )


MADE_BY = (
    gpu_tables.balance,
    gpu_tables.decode_bytes,
    gpu_tables.decode_kernels,
    gpu_tables.prefill_kernels,
    gpu_tables.compiled_kernels,
    quality_tables.demo,
    quality_tables.perplexity,
    quality_tables.retrieval,
    quality_tables.twice,
    quality_tables.ruler,
    quality_tables.sizes,
    cpu,
    cpu_avx2,
    by_torch,
    cpu_instructions,
    cpu_growth,
    engine,
    engine_avx2,
    first_answer,
    linear_memory,
    load_tables.faults,
    load_tables.soak,
    load_tables.soak_full,
    load_tables.soak_rounds,
    sparse,
    first_token,
    quality_tables.windows,
    quality_tables.eight_windows,
    quality_tables.sparse_quality,
    model_counts,
    models,
)
TABLES: dict[str, Callable[[], str]] = {made.__name__: made for made in MADE_BY}
TABLES |= {"support": support_table.table, "features": support_table.features}
# Beside the README's picture and prose stands no table, only what is said of their age.
TABLES |= {"evaluation": str}
OF_NO_TABLE = {"evaluation": "The picture and these numbers were measured"}
# The records behind a table that says if they are older. Rows of compiled_kernels have commits.
DATED = {
    "balance": ("balance",),
    "decode_bytes": ("balance",),
    "decode_kernels": ("kernels",),
    "prefill_kernels": ("prefill-kernels",),
    "linear_memory": ("linear-memory",),
    "demo": ("demo",),
    "perplexity": ("perplexity",),
    "retrieval": ("retrieval",),
    "twice": ("twice-perplexity", "perplexity"),
    "ruler": ("ruler",),
    "sizes": ("sizes-perplexity", "sizes-retrieval"),
    "windows": ("windows",),
    "eight_windows": ("windows", "windows-65k"),
    "sparse_quality": tuple(f"sparse-quality-{each}" for each in SPARSE_LENGTHS),
    "evaluation": ("perplexity", "retrieval"),
    "cpu": ("cpu",),
    "cpu_avx2": ("cpu-avx2",),
    "by_torch": ("cpu", "cpu-avx2"),
    "cpu_instructions": ("cpu-instructions",),
    "cpu_growth": ("cpu-growth",),
    "engine": ("engine-cpu",),
    "engine_avx2": ("engine-cpu-avx2",),
    "first_answer": ("first-answer",),
    "faults": ("faults",),
    "soak": ("soak",),
    "soak_full": ("soak-full",),
    "soak_rounds": ("soak-full",),
    "sparse": ("sparse-32k", "sparse-128k"),
    "first_token": ("first-token-32k",),
    "model_counts": ("models",),
    "models": ("models",),
}


def rewritten(text: str) -> str:
    """A document with the tables that are true now."""

    def made(name: str) -> str:
        note = records.note(*DATED.get(name, ()), said=OF_NO_TABLE.get(name, "Measured"))
        return f"{name} -->\n{TABLES[name]()}{note}"

    return TABLE.sub(lambda found: made(found[1]), text)


if __name__ == "__main__":
    for document in DOCUMENTS:
        document.write_text(rewritten(document.read_text()))
