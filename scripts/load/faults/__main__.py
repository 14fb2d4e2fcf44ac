"""Break something under a server with DCA, and see what comes of it.

A tiny random model is served in fp32, past its window, again and again. Each scenario breaks
one thing: it kills a process under load, fills the KV cache or the disk, takes the compiler
away, or damages the compiled kernel. Every answer, during and after, must have the tokens of
the server that nothing happened to. The command goes on after a scenario that fails, and says
so in the end.

With --output each scenario is on disk at once; the same command goes on after those.
"""

import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from scripts.common import record
from scripts.common.serving import console, working
from scripts.load.faults import kernel, processes
from scripts.load.faults.served import write_model

SCENARIOS = {
    scenario.__name__: scenario
    for scenario in (
        processes.engine_killed,
        processes.worker_killed,
        processes.cache_full,
        kernel.two_compile,
        kernel.library_damaged,
        kernel.compiler_missing,
        kernel.compiler_fails,
        kernel.disk_full,
    )
}


def main(
    only: Annotated[str, typer.Option(help="Names of scenarios.")] = " ".join(SCENARIOS),
    output: Annotated[Path | None, typer.Option(help="Write a record as JSON.")] = None,
) -> None:
    facts = record.provenance("vllm", "vllm-dca")
    del facts["command"]  # some of them, or all
    command = "python -m scripts.load.faults --output docs/results/faults.json"
    kept = record.Growing(output, {"command": command})
    failures = {}
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        write_model(model)
        with working("what it answers if nothing happens"):
            expected = processes.alone(model)
        for name in only.split():
            if name in kept.results:
                continue
            scenario = SCENARIOS[name]
            start = time.monotonic()
            try:
                with working((scenario.__doc__ or name).splitlines()[0]):
                    found = scenario(model, expected)
            except Exception as error:
                console.print(f"{type(error).__name__}: {error}", markup=False)
                failures[name] = str(error)
                continue
            fault = (scenario.__doc__ or name).split(". ")[0].rstrip(".")
            seconds = round(time.monotonic() - start)
            kept.add(name, "found", {"fault": fault, **found, "seconds": seconds, **facts})
    table = Table("fault", "clients", "server", "afterwards")
    for of in kept.results.values():
        found = of["found"]
        table.add_row(*(found[key] for key in ("fault", "clients", "server", "afterwards")))
    console.print(table)
    for name, why in failures.items():
        console.print(f"{name} FAILED: {why}", style="bold red", markup=False)
    if failures:
        raise typer.Exit(1)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, rich_markup_mode="markdown")
    app.command(help=__doc__)(main)
    app()
