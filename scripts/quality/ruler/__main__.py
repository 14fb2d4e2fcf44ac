"""RULER's tasks that need no data but a text, against served models.

Each of the methods gets a server of its own, `vllm serve`; unknown arguments go to it.
With --base-url the server that runs there is asked, and --method says which one it has. A
server that runs DCA and should not, or the other way round, ends the command. Lengths are in
the served model's own tokens, the answer included. An answer scores the share of the expected
strings that it holds, in upper or lower case.

The texts, the questions and what is expected follow from --seed. The wording is this project's
own, as are the texts. So compare methods by it, and other people's numbers with care.

With --output a text's answers are on disk at once; the same command goes on after the last.
"""

import contextlib
import functools
import math
import shlex
import signal
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from scripts.common import record
from scripts.quality import methods, study
from scripts.quality.methods import Method
from scripts.quality.ruler import sample as scoring
from scripts.quality.ruler.served import Served, serve
from scripts.quality.ruler.tasks import TASKS, sample_of


def score(results: dict[str, Any], task: str, length: int) -> float:
    """A task's mean share of strings found, NaN if it was not asked for."""
    shares = [
        answer["found"] / len(answer["expected"])
        for column, of in results.items()
        if column.startswith(f"{length} {task} ")
        for answer in of["answers"]
    ]
    return statistics.fmean(shares) if shares else math.nan


def ask(served: Served, name: str, length: int, number: int, seed: int) -> dict[str, Any]:
    """One text, and the answers to its questions."""
    task = TASKS[name]
    # Tasks that are alike share their texts, so the second finds the first one's blocks.
    sample, tokens = sample_of(task, f"{seed} {number}", length, served.tokens)
    answers = []
    for question in sample.questions:
        answer = served.answer(sample, question, task.answer)
        found = scoring.found(answer, question.expected)
        answers.append(
            {
                "question": question.text,
                "expected": question.expected,
                "answer": answer,
                "found": found,
            }
        )
    return {"tokens": tokens, "answers": answers}


@contextlib.contextmanager
def server_of(
    method: Method, base_url: str, *how: Any, chat: bool
) -> Iterator[tuple[Served, dict[str, Any]]]:
    """The server at `base_url`, or a new one; and what a record says of it."""
    facts = record.provenance("vllm", "vllm-dca", "transformers", "openai")
    own = contextlib.nullcontext((base_url, base_url)) if base_url else serve(*how)
    with own as (url, command):
        served = Served(url, chat)
        yield served, {**facts, "server": command, "attention": served.require(method)}


def main(
    context: typer.Context,
    model: Annotated[Path, typer.Option(help="A directory.")] = study.DEMO_MODEL,
    base_url: Annotated[str, typer.Option(help="A server that runs.")] = "",
    method: Annotated[str, typer.Option(help="Methods, spaces between.")] = "plain yarn dca",
    lengths: Annotated[str, typer.Option(help="Tokens.")] = "4096 16384",
    task: Annotated[str, typer.Option(help="Tasks, spaces between.")] = " ".join(TASKS),
    samples: Annotated[int, typer.Option(help="Texts of each task and length.")] = 1,
    seed: int = 0,
    chat: Annotated[bool, typer.Option(help="Ask through the chat template.")] = False,
    max_model_len: Annotated[int, typer.Option(help="Or the longest length.")] = 0,
    port: int = 8000,
    output: Annotated[Path | None, typer.Option(help="A record as JSON.")] = None,
) -> None:
    chosen = [Method.parse(label) for label in shlex.split(method)]
    ends, names = sorted(map(int, lengths.split())), task.split()
    if unknown := {*names} - {*TASKS}:
        raise typer.BadParameter(f"no task {', '.join(unknown)}: there is {', '.join(TASKS)}")
    if base_url and (len(chosen) > 1 or context.args):
        raise typer.BadParameter("a server that runs has one method, and its own arguments")
    # Else a server would outlive what something stops.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    methods.use_every_core()
    # YaRN's factor follows from the longest length.
    longest = max(max_model_len, *ends)
    asked = {"model": model.name, "seed": seed, "chat": chat, "max_model_len": longest}
    growing = record.Growing(output, asked)
    plan = [
        (f"{length} {name} {number}", number, length, name)
        for number in range(samples)
        for length in ends
        for name in names
    ]
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    for each in chosen:
        done = growing.results.get(each.label, {})
        missing = [text for text in plan if text[0] not in done]
        if not missing:
            continue
        how = (model, each, longest, port, context.args)
        with (
            server_of(each, base_url, *how, chat=chat) as (served, facts),
            Progress(*columns, TimeElapsedColumn(), console=study.console) as progress,
        ):
            shown = progress.add_task(each.label, total=len(plan))
            progress.advance(shown, len(plan) - len(missing))
            run = f"run {sum(column.startswith('run') for column in done)}"
            growing.add(each.label, run, facts)
            for column, number, length, name in missing:
                progress.update(shown, description=f"{each.label}: {name}, {length:,} tokens")
                found = ask(served, name, length, number, seed)
                # A server may be another one by now.
                served.require(each)
                growing.add(each.label, column, {"run": run, **found})
                progress.advance(shown)
    for length in ends:
        table = Table(f"{length:,} tokens", *(methods.name_of(each.label) for each in chosen))
        of = functools.partial(score, length=length)
        for name in names:
            scores = (of(growing.results[each.label], name) for each in chosen)
            table.add_row(name, *(f"{100 * share:.0f}" for share in scores))
        study.console.print(table)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, rich_markup_mode="markdown")
    unknown = {"allow_extra_args": True, "ignore_unknown_options": True}
    app.command(help=__doc__, context_settings=unknown)(main)
    app()
