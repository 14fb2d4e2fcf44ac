"""Budgets of sparse prefill, from the user's own text."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table


def run(
    model: str, text: Path, recall: float, output: Path, given: dict[str, Any], console: Console
) -> None:
    """Write budgets, and print what they keep, layer by layer.

    Args:
        model: a checkpoint's directory or name.
        text: a file.
        recall: the share of attention that each head is to keep.
        output: where to write them.
        given: the engine's options.
        console: where to print.

    Raises:
        ValueError, NotImplementedError, OSError: as a start would; or nothing was sparse.
        RuntimeError: the engine failed.
    """
    from vllm_dca.engine.calibrate import as_config, calibrate

    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("Starting the engine", total=None)

        def seen(steps: int) -> None:
            progress.update(task, description="Reading the text", total=steps, advance=1)

        budgets = calibrate(model, text, recall, given, seen)
    output.write_text(json.dumps(as_config(budgets), indent=1) + "\n")
    table = Table("layer", "attention kept", "least of a head", "keys kept")
    heads = [each for layer in budgets.values() for each in layer]
    for name, layer in (*budgets.items(), ("all", heads)):
        recalls, keys = [each.recall for each in layer], [each.keys for each in layer]
        table.add_row(
            str(name),
            f"{sum(recalls) / len(recalls):.3f}",
            f"{min(recalls):.3f}",
            f"{sum(keys) / len(keys):.3f}",
        )
    console.print(table)
    short = sum(each.recall < recall for each in heads)
    if short:
        console.print(
            f"{short} of {len(heads)} heads keep less than {recall}, whatever the budget"
        )
