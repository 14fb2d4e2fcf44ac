"""What a server is loaded with: a bench, questions with known answers, hostile clients."""

import asyncio
import contextlib
import itertools
import json
import random
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from scripts.common.serving import console
from scripts.load.soak.client import Client, request
from scripts.load.soak.plan import SERVED, Question, Round, Size

VLLM = str(Path(sys.executable).with_name("vllm"))
ATOL = 1e-3  # of log-probabilities
LEFT = 500  # tokens of an answer that its client does not wait for
STATISTICS = (
    *("duration", "total_input_tokens", "total_output_tokens", "request_throughput"),
    *("output_throughput", "total_token_throughput"),
    *("median_ttft_ms", "p99_ttft_ms", "median_itl_ms", "p99_itl_ms"),
)


class Traffic:
    """All that is sent, and what was seen of it.

    Attributes:
        counts: requests by what they were and how they ended.
        violations: what must not be.
        difference: the largest of a log-probability from the lone answer's.
        benches: of each round, in order.
    """

    def __init__(self, size: Size, client: Client, vocabulary: int) -> None:
        self.size, self.client, self.vocabulary = size, client, vocabulary
        self.counts: Counter[tuple[str, str]] = Counter()
        self.violations: list[str] = []
        self.difference = 0.0
        self.benches: list[dict[str, Any]] = []
        self.lone: list[tuple[Question, dict[str, Any]]] = []

    def expect(self, met: bool, otherwise: str) -> None:
        if not met:
            self.violations.append(otherwise)
            console.print(otherwise, style="bold red", markup=False)

    async def ask_alone(self, questions: list[Question]) -> None:
        for question in questions:
            found = await self.client.answer(question)
            answers = [choice["tokens"] for choice in found["choices"]]
            same = [answers[0]] * question.choices if answers else None
            self.expect(
                answers == same, f"{question.kind}, {len(question.text)}, alone: {found}"
            )
            if rule := question.options.get("structured_outputs"):
                text = found["choices"][0]["text"] if answers else ""
                self.expect(bool(re.fullmatch(rule["regex"], text)), f"{rule}: {text!r}")
            if answers == same:
                self.lone.append((question, found["choices"][0]))

    async def ask_again(self, loaded: asyncio.Event) -> None:
        """Every question until the load is over, and each at least twice."""
        for number in itertools.count():
            for question, expected in self.lone:
                if number >= 2 and loaded.is_set():
                    return
                salt = None if number % 2 else str(number)
                found = await self.client.answer(question, salt)
                if found["status"] == 0:
                    raise ConnectionError(f"the server is gone: {found['said']}")
                right = self.is_as_alone(question, expected, found)
                what = f"{question.kind}, {len(question.text)} tokens"
                self.expect(right, f"{what}: alone {expected}, loaded {found}")
                kind = f"{question.kind}, {'maybe from the cache' if number % 2 else 'afresh'}"
                self.counts[kind, "right" if right else "wrong"] += 1

    def is_as_alone(
        self, question: Question, expected: dict[str, Any], found: dict[str, Any]
    ) -> bool:
        if len(found["choices"]) != question.choices:
            return False
        pairs = [
            pair
            for choice in found["choices"]
            for pair in zip(choice["logprobs"], expected["logprobs"], strict=False)
        ]
        off = max(abs(one - other) for one, other in pairs)
        self.difference = max(self.difference, off)
        tokens = [choice["tokens"] for choice in found["choices"]]
        return tokens == [expected["tokens"]] * question.choices and off <= ATOL

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
                status, _ = await self.client.send(body)
                self.expect(status in expected, f"{kind}: status {status}")
                self.counts[kind, str(status)] += 1
                await self._pause(loaded)
            for kind, length, patience in (
                ("hung up in the answer", 100, None),
                ("hung up before it", 2000, 0.3),
            ):
                prompt = random.choices(range(5, self.vocabulary), k=length)
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self.client.hang_up(prompt, LEFT), patience)
                self.counts[kind, "hung up"] += 1
                await self._pause(loaded)

    async def _pause(self, until: asyncio.Event) -> None:
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(until.wait(), self.size.pause)

    async def bench(self, plan: Round, url: str, model: Path) -> None:
        with tempfile.TemporaryDirectory() as directory:
            options = {
                "base-url": url,
                "model": SERVED,
                "tokenizer": model,
                "dataset-name": "random",
                "random-input-len": plan.input_len,
                "random-output-len": plan.output_len,
                "random-range-ratio": json.dumps({"input": plan.spread, "output": 0.5}),
                "num-prompts": plan.requests,
                "max-concurrency": plan.concurrency,
                "seed": len(self.benches),
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
        self.benches.append({**asdict(plan), **{name: found[name] for name in STATISTICS}})

    def hung_up(self) -> int:
        return sum(n for (_, how), n in self.counts.items() if how == "hung up")


def arguments(options: dict[str, Any]) -> list[str]:
    return [f"--{name}={value}" for name, value in options.items()]
