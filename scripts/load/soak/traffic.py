"""What a server is loaded with: a bench, questions with known answers, hostile clients."""

import asyncio
import contextlib
import itertools
import json
import random
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from scripts.common.serving import VLLM, console
from scripts.load.soak.client import Client, request
from scripts.load.soak.plan import SERVED, Question, Round, Size

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
            if found["status"] != 200:
                self.expect(False, f"{question.kind}, {len(question.text)} tokens: {found}")
                continue
            if rule := question.options.get("structured_outputs"):
                text = found["choices"][0]["text"]
                self.expect(bool(re.fullmatch(rule["regex"], text)), f"{rule}: {text!r}")
            self.lone.append((question, found["choices"][0]))

    async def ask_again(self, loaded: asyncio.Event) -> None:
        """Every question until the load is over, and each at least twice."""
        for number in itertools.count():
            for question, alone in self.lone:
                if number >= 2 and loaded.is_set():
                    return
                salt = None if number % 2 else str(number)
                found = await self.client.answer(question, salt)
                if found["status"] == 0:
                    raise ConnectionError(f"the server is gone: {found['said']}")
                expected = await self.expected(question, alone, found)
                right = self.is_expected(expected, found["choices"])
                what = f"{question.kind}, {len(question.text)} tokens"
                self.expect(right, f"{what}: expected {expected}, found {found}")
                kind = f"{question.kind}, {'maybe from the cache' if number % 2 else 'afresh'}"
                self.counts[kind, "right" if right else "wrong"] += 1

    async def expected(
        self, question: Question, alone: dict[str, Any], found: dict[str, Any]
    ) -> list[dict[str, Any]]:
        """The choices that an answer must have; samples are read again."""
        if question.choices == 1:
            return [alone]
        tokens = [choice["tokens"] for choice in found["choices"]]
        tokens += [[]] * (question.choices - len(tokens))
        read = [await self.client.read(question.text, each) for each in tokens]
        self.counts["samples, read again", "read"] += len(read)
        return [{"tokens": t, "logprobs": p} for t, p in zip(tokens, read, strict=True)]

    def is_expected(self, expected: list[dict[str, Any]], found: list[dict[str, Any]]) -> bool:
        """The same tokens, with the same log-probabilities."""
        for one, other in itertools.zip_longest(expected, found, fillvalue={"tokens": None}):
            if not one["tokens"] or one["tokens"] != other["tokens"]:
                return False
            if len(one["logprobs"]) != len(other["logprobs"]):
                return False
            pairs = zip(one["logprobs"], other["logprobs"], strict=True)
            off = max(abs(a - b) for a, b in pairs)
            self.difference = max(self.difference, off)
            if off > ATOL:
                return False
        return True

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
                ("hung up before it", self.size.abandoned, 0.3),
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
                "temperature": 0,
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
