"""What is sent to the server, and what it answers."""

import json
from collections import Counter
from typing import Any

import aiohttp

from scripts.common.metrics import samples
from scripts.load.soak.plan import ANSWER, SERVED, Question


def request(**content: Any) -> bytes:
    """Greedy unless it says otherwise: by default it would sample, which see plan.SERVERS."""
    asked = {"model": SERVED, "max_tokens": 1, "temperature": 0, **content}
    return json.dumps(asked).encode()


class Client:
    """A server's own, over HTTP.

    Attributes:
        generated: tokens of all answers that were waited for.
    """

    def __init__(self, url: str) -> None:
        self.generated = 0
        self.session = aiohttp.ClientSession(
            url,
            headers={"Content-Type": "application/json"},
            timeout=aiohttp.ClientTimeout(total=None),
            # The server closes a connection that was idle for a while, maybe as it is used.
            connector=aiohttp.TCPConnector(force_close=True),
        )

    async def send(self, body: bytes) -> tuple[int, Any]:
        try:
            async with self.session.post("/v1/completions", data=body) as response:
                return response.status, await response.json()
        except aiohttp.ClientError as error:
            return 0, repr(error)

    async def answer(self, question: Question, salt: str | None = None) -> dict[str, Any]:
        """Tokens, their log-probabilities, and how far the second choices were.

        Args:
            question: what is asked.
            salt: one of its own keeps a request from blocks that others cached.
        """
        common = {"max_tokens": ANSWER, "ignore_eos": True, "logprobs": 2}
        common |= {"prompt": question.text, "return_token_ids": True}
        salted = {} if salt is None else {"cache_salt": salt}
        status, found = await self.send(request(**common | question.options, **salted))
        if status != 200:
            return {"status": status, "said": str(found)[:500], "choices": []}
        self.generated += found["usage"]["completion_tokens"]
        return {"status": status, "choices": [_choice(each) for each in found["choices"]]}

    async def read(self, text: list[int], answer: list[int]) -> list[float]:
        """The log-probabilities that an answer's tokens have as the end of a prompt."""
        status, found = await self.send(request(prompt=text + answer, prompt_logprobs=0))
        if status != 200:
            return []
        self.generated += found["usage"]["completion_tokens"]
        entries = found["choices"][0]["prompt_logprobs"][-len(answer) :]
        pairs = zip(entries, answer, strict=True)
        return [entry[str(token)]["logprob"] for entry, token in pairs]

    async def hang_up(self, prompt: list[int], tokens: int) -> None:
        """Ask for a long answer and leave at its first token."""
        body = request(prompt=prompt, max_tokens=tokens, ignore_eos=True, stream=True)
        async with self.session.post("/v1/completions", data=body) as response:
            await response.content.readline()
            response.close()

    async def health(self) -> int:
        async with self.session.get("/health") as response:
            return response.status

    async def metrics(self) -> Counter[str]:
        """Sums over labels, by name; of requests, also by why they ended."""
        found: Counter[str] = Counter()
        async with self.session.get("/metrics") as response:
            text = await response.text()
        for sample in samples(text):
            reason = sample.labels.get("finished_reason")
            found[f"{sample.name} {reason}" if reason else sample.name] += sample.value
        return found


def _choice(choice: dict[str, Any]) -> dict[str, Any]:
    logprobs = choice["logprobs"]
    # Tokens that read the same share an entry.
    best = [sorted(top.values())[-2:] for top in logprobs["top_logprobs"] if len(top) > 1]
    return {
        "tokens": choice["token_ids"],
        "text": choice["text"],
        "logprobs": logprobs["token_logprobs"],
        "margin": min((first - second for second, first in best), default=None),
    }
