"""Draw the figures in docs/figures from the records in docs/results.

Usage: python -m scripts.docs.figures [RESULTS [FIGURES]]
"""

import itertools
import json
import math
import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from scripts.common.record import ROOT
from scripts.docs.page import SPARSE_LENGTHS
from scripts.quality.loss import losses
from scripts.quality.methods import name_of
from vllm_dca.cli import picture
from vllm_dca.method.geometry import ChunkGeometry

# Okabe and Ito's, told apart without colour vision; a method has the same one everywhere.
COLOURS = {
    "plain": "#000000",
    "yarn": "#E69F00",
    "dynamic": "#CC79A7",
    "dca": "#0072B2",
    "dca+yarn": "#009E73",
}
WINDOW = 8192


def thousands(tokens: float) -> str:
    return f"{tokens / 1024:g}k"


def perplexity_by_length(results: dict[str, Any]) -> Figure:
    """Perplexity of the tokens before each length, one line a method."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for label, found in results.items():
        lengths = [int(length) for length in found["perplexity"]]
        colour = COLOURS[label.partition(":")[0]]
        axes.plot(
            lengths,
            list(found["perplexity"].values()),
            "o-",
            color=colour,
            label=name_of(label),
        )
    _cut(axes, {label: max(of["perplexity"].values()) for label, of in results.items()})
    _lengths(axes, lengths)
    axes.set_ylabel("perplexity")
    figure.legend(loc="outside right upper", frameon=False)
    return figure


def perplexity_by_position(results: dict[str, Any], bucket: int, work: str) -> Figure:
    """The curve along one text, smoothed over 1,024 tokens."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    width = 1024 // bucket
    most = {}
    for label, found in results.items():
        curve = np.mean(found["nll"][work], axis=0)
        smooth = np.convolve(curve, np.ones(width) / width, "valid")
        positions = (np.arange(len(smooth)) + width) * bucket
        colour = COLOURS[label.partition(":")[0]]
        axes.plot(positions, np.exp(smooth), color=colour, label=name_of(label), linewidth=1.2)
        most[label] = math.exp(max(smooth))
    _cut(axes, most)
    _lengths(axes, [2048, 4096, 8192, 16384, 32768])
    axes.set_xlim(1024)
    axes.set_xlabel("position")
    axes.set_ylabel("perplexity of the last 1,024 tokens")
    axes.set_title(work.replace("-", " "), fontsize="medium")
    figure.legend(loc="outside right upper", frameon=False)
    return figure


def retrieval(results: dict[str, Any]) -> Figure:
    """A heat map a method: how much was read, by where the number stood."""
    figure = Figure(figsize=(2.4 * len(results) + 0.8, 3.4), layout="constrained")
    panels = figure.subplots(1, len(results), sharey=True, squeeze=False)[0]
    for axes, (label, found) in zip(panels, results.items(), strict=True):
        answers = [answer for given in found["answers"].values() for answer in given]
        lengths = sorted({answer["length"] for answer in answers})
        places = sorted({round(answer["position"] / 512) * 512 for answer in answers})
        cells: list[list[list[bool]]] = [[[] for _ in lengths] for _ in places]
        for answer in answers:
            place = places.index(round(answer["position"] / 512) * 512)
            cells[place][lengths.index(answer["length"])].append(answer["right"])
        share = [[np.mean(cell) if cell else math.nan for cell in row] for row in cells]
        image = axes.imshow(share, vmin=0, vmax=1, cmap="cividis", aspect="auto")
        axes.set_xticks(range(len(lengths)), map(thousands, lengths))
        axes.set_yticks(range(len(places)), [f"{place:,}" for place in places])
        axes.set_title(f"{name_of(label)}", fontsize="medium")
        inside = sum(length <= WINDOW for length in lengths)
        axes.axvline(inside - 0.5, color="red", linestyle="--", linewidth=1)
        axes.set_xlabel("tokens read")
    panels[0].set_ylabel("where the number stood")
    figure.colorbar(image, ax=panels, label="found", format=lambda x, _: f"{x:.0%}")
    return figure


def sparse_loss(of_lengths: dict[str, dict[str, Any]]) -> Figure:
    """How much higher perplexity is, by the keys that are kept and by attention's time.

    Args:
        of_lengths: by the tokens that were read, the results of a record.
    """
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    ways = (("auto", "auto", COLOURS["dca"]), ("window", "first and nearest", COLOURS["yarn"]))
    lines = zip(("-", "-.", "--"), of_lengths.items(), strict=True)
    for (kind, name, colour), (dashes, (length, results)) in itertools.product(ways, lines):
        found = losses(results)
        of_kind = [of for label, of in found.items() if label.startswith(f"{kind} ")]
        of_kind.sort(key=lambda of: of.keys or 0.0)
        for axes, shares in zip(
            panels,
            ([of.keys for of in of_kind], [of.attention_time for of in of_kind]),
            strict=True,
        ):
            more = [of.more for of in of_kind]
            label = f"{name}, {length} tokens"
            axes.plot(shares, more, dashes, marker="o", color=colour, label=label)
    for axes, label in zip(
        panels, ("share of the keys kept", "attention's time, dense = 1"), strict=True
    ):
        axes.axhline(0, color="grey", linestyle="--", linewidth=1)
        axes.set_xlim(0, 1.05)
        axes.set_xlabel(label)
        axes.yaxis.set_major_formatter(lambda x, _: f"{x:+.0%}")
    panels[0].set_ylabel("perplexity, beside dense")
    panels[0].legend(frameon=False)
    return figure


def _cut(axes: Any, most: dict[str, float]) -> None:
    """End the picture where lines that go far beyond the others leave it, and say how far."""
    top = 1.15 * min(most.values())
    staying = [value for value in most.values() if value < 3 * top]
    lowest = min(min(line.get_ydata()) for line in axes.lines)
    axes.set_ylim(0.93 * lowest, 1.15 * max(staying))
    leaving = [label for label, value in most.items() if value >= 3 * top]
    for row, label in enumerate(leaving):
        text = f"↑ {name_of(label)}: up to {most[label]:,.0f}"
        axes.text(0.99, 0.97 - 0.07 * row, text, ha="right", va="top", transform=axes.transAxes)


def _lengths(axes: Any, lengths: list[int]) -> None:
    axes.axvline(WINDOW, color="grey", linestyle="--", linewidth=1)
    axes.text(WINDOW, axes.get_ylim()[0], " trained window", va="bottom", color="grey")
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [thousands(length) for length in lengths])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("tokens read")


def relative_positions() -> Figure:
    """Plain RoPE's distances beside DCA's, on the demo model's sizes."""
    geometry = ChunkGeometry(chunk_size=6144, local_size=1024)
    length = picture.CHUNKS * geometry.chunk_len
    tokens, dca = picture.relative_positions(geometry, length)
    plain = np.where(np.isnan(dca), np.nan, tokens[:, None] - tokens[None, :])
    figure = Figure(figsize=(9, 4.3), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    colours = matplotlib.colormaps["viridis"].with_extremes(over="tab:red")
    for axes, matrix, title in zip(
        panels, (plain, dca), ("plain RoPE", "Dual Chunk Attention"), strict=True
    ):
        image = axes.imshow(
            matrix,
            extent=(0, length, length, 0),
            vmin=0,
            vmax=WINDOW,
            cmap=colours,
            interpolation="nearest",
        )
        ticks = range(0, length + 1, geometry.chunk_len)
        axes.set_xticks(ticks, [thousands(tick) for tick in ticks])
        axes.set_yticks(ticks, [thousands(tick) for tick in ticks])
        axes.set_xlabel("key")
        axes.set_title(title, fontsize="medium")
    panels[0].set_ylabel("query")
    panels[1].grid(color="white", linewidth=0.5)
    label = "distance seen; red: never trained"
    figure.colorbar(image, ax=panels, label=label, extend="max")
    return figure


def main() -> None:
    folders = [Path(argument) for argument in sys.argv[1:]]
    results = folders[0] if folders else ROOT / "docs/results"
    target = folders[1] if folders[1:] else ROOT / "docs/figures"
    target.mkdir(parents=True, exist_ok=True)

    def save(figure: Figure, name: str) -> None:
        figure.savefig(target / f"{name}.png", dpi=130)

    save(relative_positions(), "relative-positions")
    record = json.loads((results / "perplexity.json").read_text())
    save(perplexity_by_length(record["results"]), "perplexity")
    for work in record["works"]:
        curves = perplexity_by_position(record["results"], record["bucket"], work)
        save(curves, f"perplexity-{work}")
    save(
        retrieval(json.loads((results / "retrieval.json").read_text())["results"]), "retrieval"
    )
    reads = {
        length: json.loads((results / f"sparse-quality-{length}.json").read_text())["results"]
        for length in SPARSE_LENGTHS
    }
    save(sparse_loss(reads), "sparse-loss")


if __name__ == "__main__":
    main()
