"""Load a server with DCA for a while: right answers, no leak, alive at the end.

Starts `vllm serve MODEL --attention-backend dca` in fp32, first with speculation by ngrams and
a LoRA adapter, then without, and asks each server, one at a time, for greedy answers to texts
of mixed length, and for one that needs each feature: a regular expression, a text that repeats
itself, and of the first server the adapter, of the second three samples. Then `vllm bench
serve` loads it, round by round and pass by pass, while the same questions are asked again, half
of them without their cached prefix, and other clients hang up, send prompts that are too long,
broken JSON and the name of no model. Fails unless

- the log says that DCA attends the layers;
- every answer under load has the lone one's tokens, with its log-probabilities to 1e-3, and
  samples have those that their tokens have when they are read as a prompt;
- prefixes were found in the cache, and drafts of the speculation were taken;
- the bench's requests are all served, and the bad ones refused with the right status;
- no more than a tenth of the answers that nobody waits for is generated;
- the processes settle at most 64 MiB higher in the second half of the passes than in the first;
- in the end nothing runs or waits, no block of the KV cache is held, and it answers as before.

The record is on disk after each pass; the same command goes on after a server that came to a
good end. Unknown arguments go to `vllm serve`. (With --dtype
bfloat16 expect wrong answers that are none: first choices are then often ties, which another
batch breaks otherwise.)
"""

import asyncio
import json
import os
import re
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
from rich.table import Table
from tokenizers import Tokenizer

from scripts.common import adapter, corpus, demo_model, record
from scripts.common.serving import CACHE, VLLM, console, server, working
from scripts.load.soak.client import Client
from scripts.load.soak.plan import ADAPTER, FULL, SERVED, SERVERS, SMALL, Size, questions
from scripts.load.soak.traffic import Traffic, arguments
from scripts.load.soak.watch import Memory, check_end


class Record:
    """What is known so far of each server, on disk after each of its passes.

    Of a record of these very facts the servers that came to a good end are kept.
    """

    def __init__(self, output: Path | None, facts: dict[str, Any]) -> None:
        self.output, self.facts = output, facts
        self.servers: dict[str, dict[str, Any]] = {}
        if output and output.exists():
            before = json.loads(output.read_text())
            servers = before.pop("servers", {})
            if before == facts:
                ended = {name: of for name, of in servers.items() if "memory" in of}
                self.servers = {n: of for n, of in ended.items() if not of["violations"]}

    def keep(self, name: str, facts: dict[str, Any], traffic: Traffic, passes: int) -> None:
        """What is known of a server now, `facts` among it."""
        counted = sorted(traffic.counts.items())
        lone = [answer for question, answer in traffic.lone if question.choices == 1]
        self.servers[name] = {
            "passes": passes,
            "requests_in_all": len(traffic.lone) + traffic.counts.total(),
            "requests": {f"{kind}: {how}": n for (kind, how), n in counted if n},
            "texts": {
                "lengths": traffic.size.checked,
                "largest_difference_of_logprob": traffic.difference,
                "closest_second_choice_alone": min(
                    answer["margin"] for answer in lone if answer["margin"]
                ),
            },
            "bench": traffic.benches,
            **facts,
            "violations": traffic.violations,
        }
        if self.output:
            record.write(self.output, {**self.facts, "servers": self.servers})


@dataclass
class Soak:
    """A server under load.

    Attributes:
        name: one of SERVERS.
        facts: what is known of it already.
        minutes: no pass begins later.
    """

    name: str
    size: Size
    url: str
    process: psutil.Process
    model: Path
    facts: dict[str, Any]
    kept: Record
    minutes: float

    async def run(self) -> None:
        tokenizer = Tokenizer.from_file(str(self.model / "tokenizer.json"))
        prose = tokenizer.encode(corpus.load()).ids
        asked = list(questions(prose, self.size.checked, SERVERS[self.name]))
        client = Client(self.url)
        start = time.monotonic()
        async with client.session:
            traffic = Traffic(self.size, client, tokenizer.get_vocab_size())
            memory = Memory(self.process)
            with working("questions alone"):
                await traffic.ask_alone(asked)
            if not traffic.lone:
                sys.exit("it answered nothing, alone")
            loaded = asyncio.Event()
            watching = asyncio.create_task(memory.watch())
            others = asyncio.gather(traffic.ask_again(loaded), traffic.disturb(loaded))
            passes = await self.load(traffic, memory)
            loaded.set()
            with working("the other clients finish"):
                await others
            traffic.expect(not watching.done(), "a process of the server ended")
            watching.cancel()
            with working("what is left"):
                end = await check_end(traffic, memory, SERVERS[self.name])
            end["seconds"] = round(time.monotonic() - start)
            self.kept.keep(self.name, {**self.facts, **end}, traffic, passes)

    async def load(self, traffic: Traffic, memory: Memory) -> int:
        """The passes, two at least; how many there were."""
        start = time.monotonic()
        for number in range(1, self.size.passes + 1):
            for plan in self.size.rounds:
                what = f"pass {number}: {plan.requests} requests, {plan.concurrency} at once"
                with working(what):
                    await traffic.bench(plan, self.url, self.model)
            memory.ends_of_passes.append(len(memory.samples))
            self.kept.keep(self.name, self.facts, traffic, number)
            if number >= 2 and time.monotonic() - start > self.minutes * 60:
                break
        return number


def show(result: dict[str, Any]) -> None:
    table = Table("at once", "requests", "tokens/s", "first token", "between tokens")
    for bench in result["bench"]:
        table.add_row(
            str(bench["concurrency"]),
            str(bench["requests"]),
            f"{bench['total_token_throughput']:.0f}",
            f"{bench['median_ttft_ms'] / 1000:.2f} s",
            f"{bench['median_itl_ms']:.0f} ms",
        )
    console.print(table)
    for what, count in result["requests"].items():
        console.print(f"{count:6} {what}")
    memory = "memory: {first_settled_mib} MiB, up to {first_peak_mib}; in the second half "
    memory += "{second_settled_mib}, up to {second_peak_mib}"
    console.print(memory.format(**result["memory"]))
    console.print(f"{result['requests_in_all']} requests, {len(result['violations'])} wrong")


def command_of(model: Path, size: Size, adapted: Path, port: int, name: str) -> list[str]:
    options: dict[str, Any] = {
        "attention-backend": "dca",
        "additional-config": size.additional_config,
        "max-model-len": size.max_model_len,
        "dtype": "float32",
        "served-model-name": SERVED,
        "port": port,
    }
    served = [VLLM, "serve", str(model), *arguments(options)]
    if not SERVERS[name]:
        return served
    ngram = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4}
    more = {"speculative-config": json.dumps(ngram), "lora-modules": f"{ADAPTER}={adapted}"}
    return [*served, *arguments(more), "--enable-lora"]


def main(
    context: typer.Context,
    model: Annotated[Path, typer.Option(help="A directory.")] = CACHE / "demo-model",
    small: Annotated[bool, typer.Option(help="Short texts, with small chunks.")] = False,
    minutes: Annotated[
        float, typer.Option(help="No pass of a server begins later; there are two at least.")
    ] = 1e9,
    port: int = 8000,
    output: Annotated[Path | None, typer.Option(help="Write a record as JSON.")] = None,
) -> None:
    size = SMALL if small else FULL
    # Else a server would outlive a soak that something stops.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    # vLLM's own knobs for the CPU: every core, and a cache that the longest prompts fill.
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", cores)
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    # What vLLM's linear layers keep (scripts/bench/linear_memory.py) would hide a leak.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    if not model.exists():
        with working("unpacking the model"):
            demo_model.convert(model)
    facts = {**record.provenance("vllm", "vllm-dca"), "cores": len(os.sched_getaffinity(0))}
    kept = Record(output, facts)
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        adapted = Path(scratch) / "adapter"
        adapter.write(model, adapted, scale=0.02)
        for name in SERVERS:
            if name in kept.servers:
                continue
            url, log = f"http://localhost:{port}", CACHE / f"soak-{name}-{port}.log"
            command = [*command_of(model, size, adapted, port, name), *context.args]
            started = time.monotonic()
            with server(command, url, log) as process:
                attends = re.search(r"DCA attends \d+ layers.*", log.read_text())
                if attends is None:
                    sys.exit("the log does not say that DCA attends any layer")
                of_server = {
                    "server": record.command("vllm", *command[1:]),
                    "backend": attends[0],
                    "seconds_to_start": round(time.monotonic() - started),
                }
                run = Soak(name, size, url, process, model, of_server, kept, minutes)
                asyncio.run(run.run())
            show(kept.servers[name])
    if any(found["violations"] for found in kept.servers.values()):
        raise typer.Exit(1)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, rich_markup_mode="markdown")
    unknown = {"allow_extra_args": True, "ignore_unknown_options": True}
    app.command(help=__doc__, context_settings=unknown)(main)
    app()
