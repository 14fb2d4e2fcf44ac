"""Load a server with DCA for a while: right answers, no leak, alive at the end.

Starts `vllm serve MODEL --attention-backend dca` in fp32 and asks it, one at a time, for greedy
answers to texts of mixed length. Then `vllm bench serve` loads it, round by round, while the
same texts are asked for again, half of them without their cached prefix, and other clients hang
up, send prompts that are too long, broken JSON and the name of no model. Fails unless

- the log says that DCA attends the layers;
- every answer under load has the lone one's tokens, with its log-probabilities to 1e-3;
- the bench's requests are all served, and the bad ones refused with the right status;
- no more than a tenth of the answers that nobody waits for is generated;
- the processes need at most 64 MiB more when the rounds are run a second time;
- in the end nothing runs or waits, no block of the KV cache is held, and it answers as before.

Unknown arguments go to `vllm serve`. (With --dtype bfloat16 expect wrong answers that are none:
first choices are then often ties, which another batch breaks otherwise.)
"""

import asyncio
import contextlib
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import aiohttp
import psutil
import typer
from rich.table import Table
from tokenizers import Tokenizer

from scripts.common import corpus, demo_model, record
from scripts.common.serving import CACHE, console, server, working

NAME = "soaked"
VLLM = str(Path(sys.executable).with_name("vllm"))
ANSWER = 16  # tokens of an answer that is checked
ATOL = 1e-3  # of their log-probabilities
LEFT = 500  # tokens of an answer that its client does not wait for
GROWTH_MIB = 64  # of the peak from the first time through the rounds to the second


@dataclass(frozen=True)
class Round:
    """A run of `vllm bench serve`: random prompts of input_len * (1 +- spread) tokens."""

    concurrency: int
    requests: int
    input_len: int
    spread: float
    output_len: int


@dataclass(frozen=True)
class Size:
    max_model_len: int
    checked: tuple[int, ...]  # lengths of the texts
    rounds: tuple[Round, ...]  # run twice
    pause: float  # seconds between two hostile requests
    additional_config: str = "{}"


FULL = Size(
    max_model_len=16384,
    checked=(50, 300, 900, 2000, 5500, 9000),
    rounds=(
        Round(4, 4, 6500, 0.35, 32),
        Round(1, 15, 400, 0.9, 32),
        Round(4, 35, 400, 0.9, 32),
        Round(16, 50, 400, 0.9, 32),
    ),
    pause=5,
)
QUICK = Size(
    max_model_len=4096,
    checked=(50, 760, 900, 1700),
    rounds=(Round(2, 2, 1800, 0.3, 8), Round(8, 16, 300, 0.9, 8)),
    pause=0.5,
    additional_config='{"dca": {"chunk_size": 1024, "local_size": 256}}',
)


@dataclass
class Soak:
    """A server under load, and what was seen of it."""

    size: Size
    process: psutil.Process
    vocabulary: int
    session: aiohttp.ClientSession
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)
    memory: list[tuple[float, list[float]]] = field(default_factory=list)
    difference: float = 0.0

    def expect(self, met: bool, otherwise: str) -> None:
        if not met:
            self.violations.append(otherwise)
            console.print(otherwise, style="bold red")

    async def send(self, body: bytes) -> tuple[int, Any]:
        try:
            async with self.session.post("/v1/completions", data=body) as response:
                return response.status, await response.json()
        except aiohttp.ClientError as error:
            return 0, repr(error)

    async def answer(self, text: list[int], **options: Any) -> dict[str, Any]:
        """Greedy tokens, their log-probabilities, and how far the second choices were."""
        asked = {"prompt": text, "max_tokens": ANSWER, "ignore_eos": True, "temperature": 0}
        status, found = await self.send(
            request(**asked, logprobs=2, return_token_ids=True, **options)
        )
        if status != 200:
            return {"status": status, "tokens": [], "logprobs": [], "margin": 0.0}
        [choice] = found["choices"]
        logprobs = choice["logprobs"]
        # Tokens that read the same share an entry.
        best = [sorted(top.values())[-2:] for top in logprobs["top_logprobs"] if len(top) > 1]
        return {
            "status": status,
            "tokens": choice["token_ids"],
            "logprobs": logprobs["token_logprobs"],
            "margin": min(first - second for second, first in best),
        }

    async def check_answers(
        self, lone: list[tuple[list[int], dict[str, Any]]], loaded: asyncio.Event
    ) -> None:
        """Ask for the texts again until the load is over, each at least twice."""
        for number in itertools.count():
            for text, expected in lone:
                if number >= 2 and loaded.is_set():
                    return
                # A salt of its own keeps a request from blocks that others cached.
                salt = {} if number % 2 else {"cache_salt": f"{number}"}
                found = await self.answer(text, **salt)
                off = [
                    abs(a - b)
                    for a, b in zip(found["logprobs"], expected["logprobs"], strict=False)
                ]
                self.difference = max([self.difference, *off])
                right = found["tokens"] == expected["tokens"] and max(off) <= ATOL
                self.expect(right, f"{len(text)} tokens, alone {expected}, loaded {found}")
                kind = "text, maybe from the cache" if number % 2 else "text, afresh"
                self.counts[kind, "right" if right else "wrong"] += 1

    async def disturb(self, loaded: asyncio.Event) -> None:
        """Hostile clients, one after the other, until the load is over, each at least once."""
        bodies = {
            "too long": (request(prompt=[5] * (self.size.max_model_len + 1)), [400]),
            "cut-off JSON": (request(prompt=[5])[:-5], range(400, 500)),
            "no JSON": (b"\x00\xff" * 100, range(400, 500)),
            "wrong type": (request(prompt={"text": 5}), range(400, 500)),
            "negative max_tokens": (request(prompt=[5], max_tokens=-5), range(400, 500)),
            "no such token": (request(prompt=[self.vocabulary + 9999]), range(400, 500)),
            "unknown model": (request(model="nobody", prompt=[5]), [404]),
        }
        while not loaded.is_set():
            for kind, (body, expected) in bodies.items():
                status, _ = await self.send(body)
                self.expect(status in expected, f"{kind}: status {status}")
                self.counts[kind, str(status)] += 1
                await pause(self.size.pause, loaded)
            for kind, length, patience in (
                ("hung up in the answer", 100, None),
                ("hung up before it", 2000, 0.3),
            ):
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self.hang_up(length), patience)
                self.counts[kind, "hung up"] += 1
                await pause(self.size.pause, loaded)

    async def hang_up(self, length: int) -> None:
        """Ask for a long answer and leave at its first token."""
        prompt = random.choices(range(5, self.vocabulary), k=length)
        body = request(prompt=prompt, max_tokens=LEFT, ignore_eos=True, stream=True)
        async with self.session.post("/v1/completions", data=body) as response:
            await response.content.readline()
            response.close()

    async def watch_memory(self) -> None:
        start = time.monotonic()
        processes = [self.process, *self.process.children(recursive=True)]
        while True:  # a process that ends is a failure
            resident = [process.memory_info().rss / 2**20 for process in processes]
            self.memory.append((time.monotonic() - start, resident))
            await asyncio.sleep(1)

    async def bench(self, plan: Round, seed: int, url: str, model: Path) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as directory:
            options = {
                "base-url": url,
                "model": NAME,
                "tokenizer": model,
                "dataset-name": "random",
                "random-input-len": plan.input_len,
                "random-output-len": plan.output_len,
                "random-range-ratio": json.dumps({"input": plan.spread, "output": 0.5}),
                "num-prompts": plan.requests,
                "max-concurrency": plan.concurrency,
                "seed": seed,
                "result-dir": directory,
                "result-filename": "result.json",
            }
            flags = ("--ignore-eos", "--save-result", "--disable-tqdm")
            process = await asyncio.create_subprocess_exec(
                *(VLLM, "bench", "serve", *arguments(options), *flags),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            output, _ = await process.communicate()
            if process.returncode:
                raise RuntimeError(f"vllm bench serve failed: {output.decode()[-2000:]}")
            found = json.loads((Path(directory) / "result.json").read_text())
        missing = plan.requests - found["completed"]
        self.expect(not missing, f"{plan}: {missing} requests were not served")
        self.counts["bench", "served"] += found["completed"]
        self.counts["bench", "failed"] += missing
        names = ("duration", "total_input_tokens", "total_output_tokens", "request_throughput")
        names += ("output_throughput", "total_token_throughput")
        names += ("median_ttft_ms", "p99_ttft_ms", "median_itl_ms", "p99_itl_ms")
        return {**asdict(plan), **{name: found[name] for name in names}}

    async def metrics(self) -> Counter[str]:
        """Sums over labels, by name; of requests, also by why they ended."""
        found: Counter[str] = Counter()
        async with self.session.get("/metrics") as response:
            lines = (await response.text()).splitlines()
        for line in lines:
            if line.startswith(("vllm:", "vllm_dca:")):
                reason = re.search(r'finished_reason="(\w+)"', line)
                name = line.partition("{")[0] + (f" {reason[1]}" if reason else "")
                found[name] += float(line.split()[-1])
        return found

    async def drained(self) -> Counter[str]:
        """The metrics when nothing is in flight, or after a minute."""
        held = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        for _ in range(60):
            found = await self.metrics()
            if not any(found[f"vllm:{name}"] for name in held):
                break
            await asyncio.sleep(1)
        for name in held:
            value = found[f"vllm:{name}"]
            self.expect(value == 0, f"{name} is {value} a minute after the load")
        return found

    def memory_of_halves(self, middle: int) -> dict[str, Any]:
        """Peaks before and after a sample's number, of all processes together."""
        curve = [sum(mib) for _, mib in self.memory]
        first, second = max(curve[:middle]), max(curve[middle:])
        growth = second - first
        self.expect(growth <= GROWTH_MIB, f"the processes grew by {growth:.0f} MiB")
        kept: dict[str, Any] = {
            "bound_of_growth_mib": GROWTH_MIB,
            "first_peak_mib": round(first),
            "second_peak_mib": round(second),
        }
        kept["curve_s_mib_of_each_process"] = [
            [round(t), *map(round, mib)]
            for t, mib in self.memory[:: len(self.memory) // 60 + 1]
        ]
        return kept


def request(**content: Any) -> bytes:
    return json.dumps({"model": NAME, "max_tokens": 1, **content}).encode()


async def pause(seconds: float, until: asyncio.Event) -> None:
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(until.wait(), seconds)


def arguments(options: dict[str, Any]) -> list[str]:
    return [f"--{name}={value}" for name, value in options.items()]


async def soak(size: Size, url: str, process: psutil.Process, model: Path) -> dict[str, Any]:
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    prose = tokenizer.encode(corpus.load()).ids
    starts = itertools.accumulate(size.checked, initial=0)
    texts = [prose[at : at + n] for at, n in zip(starts, size.checked, strict=False)]
    options = {
        "headers": {"Content-Type": "application/json"},
        "timeout": aiohttp.ClientTimeout(total=None),
        # The server closes a connection that was idle for a while, maybe as it is used again.
        "connector": aiohttp.TCPConnector(force_close=True),
    }
    async with aiohttp.ClientSession(url, **options) as session:
        run = Soak(size, process, tokenizer.get_vocab_size(), session)
        with working(f"{len(texts)} texts alone"):
            lone = [(text, await run.answer(text)) for text in texts]
        for text, answer in lone:
            run.expect(answer["status"] == 200, f"{len(text)} tokens alone: {answer}")

        loaded, benches = asyncio.Event(), []
        watching = asyncio.create_task(run.watch_memory())
        clients = [run.check_answers(lone, loaded), run.disturb(loaded)]
        others = asyncio.gather(*clients)
        middle = 0
        for number, plan in enumerate(size.rounds * 2):
            if number == len(size.rounds):
                middle = len(run.memory)
            with working(f"{plan.requests} requests, {plan.concurrency} at once"):
                benches.append(await run.bench(plan, number, url, model))
        loaded.set()
        with working("the other clients finish"):
            await others
        run.expect(not watching.done(), "a process of the server ended")
        watching.cancel()
        with working("what is left"):
            metrics = await run.drained()
            again = await run.answer(texts[0], cache_salt="at the end")
            async with session.get("/health") as response:
                run.expect(response.status == 200, f"/health is {response.status} in the end")
        hung_up = sum(n for (_, how), n in run.counts.items() if how == "hung up")
        checked = sum(n for (kind, _), n in run.counts.items() if kind.startswith("text"))
        served = sum(bench["total_output_tokens"] for bench in benches)
        for_nobody = metrics["vllm:generation_tokens_total"] - served
        for_nobody -= ANSWER * (len(texts) + checked)
        run.expect(
            for_nobody < hung_up * LEFT / 10,
            f"{for_nobody:.0f} tokens for {hung_up} clients that had hung up",
        )
        run.expect(again["tokens"] == lone[0][1]["tokens"], f"in the end it answers {again}")

    kept = r"vllm:(request_success|num_preempt|num_requests_r|num_requests_waiting$|kv_cache_u"
    kept += r"|prefix_cache_(hits|queries)_|prompt_tokens_total).*|vllm_dca:.*_total"
    return {
        "requests": {f"{kind}: {how}": n for (kind, how), n in sorted(run.counts.items()) if n},
        "tokens_for_clients_that_hung_up": for_nobody,
        "requests_in_all": len(texts) + run.counts.total(),
        "texts": {
            "lengths": size.checked,
            "largest_difference_of_logprob": run.difference,
            "closest_second_choice_alone": min(answer["margin"] for _, answer in lone),
        },
        "bench": benches,
        "memory": run.memory_of_halves(middle),
        "metrics": {
            name: value
            for name, value in metrics.items()
            if re.fullmatch(kept, name) and "_created" not in name
        },
        "violations": run.violations,
    }


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
    peaks = (result["memory"][f"{time}_peak_mib"] for time in ("first", "second"))
    console.print("peak of memory: {} MiB, the second time {} MiB".format(*peaks))
    console.print(f"{result['requests_in_all']} requests, {len(result['violations'])} wrong")


def main(
    context: typer.Context,
    model: Annotated[Path, typer.Argument(help="A directory.")] = CACHE / "demo-model",
    quick: Annotated[bool, typer.Option(help="Two minutes, with small chunks.")] = False,
    port: int = 8000,
    output: Annotated[Path | None, typer.Option(help="Write a record as JSON.")] = None,
) -> None:
    size = QUICK if quick else FULL
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
    options = {
        "attention-backend": "dca",
        "additional-config": size.additional_config,
        "max-model-len": size.max_model_len,
        "dtype": "float32",
        "served-model-name": NAME,
        "port": port,
    }
    command = [VLLM, "serve", str(model), *arguments(options), *context.args]
    url, log = f"http://localhost:{port}", CACHE / f"soak-{port}.log"
    started = time.monotonic()
    with server(command, url, log) as process:
        ready = time.monotonic()
        result = asyncio.run(soak(size, url, process, model))
        seconds = time.monotonic() - ready
    attends = re.search(r"DCA attends \d+ layers.*", log.read_text())
    if attends is None:
        result["violations"].append("the log does not say that DCA attends any layer")
    show(result)

    if output:
        found = {
            "server": record.command("vllm", *command[1:]),
            "backend": attends and attends[0],
            "seconds_to_start": round(ready - started),
            "seconds": round(seconds),
            **result,
        }
        record.write(output, {**record.provenance("vllm", "vllm-dca"), **found})
    if result["violations"]:
        raise typer.Exit(1)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, rich_markup_mode="markdown")
    unknown = {"allow_extra_args": True, "ignore_unknown_options": True}
    app.command(help=__doc__, context_settings=unknown)(main)
    app()
