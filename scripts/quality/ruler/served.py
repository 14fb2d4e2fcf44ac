"""A server that answers: which attention it runs, how it counts tokens, what it says."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
from openai import OpenAI

from scripts.common import record
from scripts.common.metrics import samples
from scripts.common.serving import CACHE, VLLM, server
from scripts.quality.methods import Method
from scripts.quality.ruler.sample import Question, Sample


class Served:
    """vLLM's server at an address.

    Args:
        url: with or without /v1.
        chat: ask through the model's chat template; the answer's first words are then the
            beginning of the assistant's message.
    """

    def __init__(self, url: str, chat: bool) -> None:
        self.url, self.chat = url.rstrip("/").removesuffix("/v1"), chat
        self.client = OpenAI(
            base_url=f"{self.url}/v1", api_key="none", timeout=None, max_retries=0
        )
        self.model = self.client.models.list().data[0].id

    def require(self, method: Method) -> str:
        """What the server says of DCA.

        Raises:
            RuntimeError: it runs DCA and should not, or the other way round.
        """
        metrics = httpx.get(f"{self.url}/metrics", timeout=60).raise_for_status().text
        lengths = (each.value for each in samples(metrics) if each.name == "vllm_dca:chunk_len")
        chunk_len = next(lengths, None)
        if (chunk_len is not None) != method.is_dca:
            runs = "does not run DCA" if chunk_len is None else "runs DCA"
            raise RuntimeError(
                f"the server at {self.url} {runs}, and {method.label!r} was asked for: "
                "start it in that way, or name what it is by --method"
            )
        return "not DCA" if chunk_len is None else f"DCA, chunks of {chunk_len:.0f}"

    def tokens(self, text: str) -> int:
        """As the served model counts them."""
        asked = {"model": self.model, "prompt": text}
        if self.chat:
            messages = [{"role": "user", "content": text}]
            asked = {"model": self.model, "messages": messages}
        found = httpx.post(f"{self.url}/tokenize", json=asked, timeout=600).raise_for_status()
        return int(found.json()["count"])

    def answer(self, sample: Sample, question: Question, limit: int) -> str:
        """The greedy answer, after its first words."""
        prompt, options = sample.prompt(question), {"max_tokens": limit, "temperature": 0}
        if not self.chat:
            given = self.client.completions.create(
                model=self.model, prompt=f"{prompt}\n{question.start}", **options
            )
            return given.choices[0].text
        reply = self.client.chat.completions.create(
            model=self.model,
            messages=[
                {"role": "user", "content": prompt},
                {"role": "assistant", "content": question.start},
            ],
            extra_body={"continue_final_message": True, "add_generation_prompt": False},
            **options,
        )
        return reply.choices[0].message.content or ""


@contextlib.contextmanager
def serve(
    model: Path, method: Method, length: int, port: int, others: Sequence[str]
) -> Iterator[tuple[str, str]]:
    """`vllm serve` with a method: its URL, and the command."""
    from transformers import AutoConfig

    options: dict[str, Any] = {
        "served-model-name": model.name,
        "max-model-len": length,
        "port": port,
    }
    chosen = method.engine_options(AutoConfig.from_pretrained(model), length)
    for name, value in chosen.items():
        if value:
            text = value if isinstance(value, str) else json.dumps(value)
            options[name.replace("_", "-")] = text
    arguments = [f"--{name}={value}" for name, value in options.items()]
    command = [VLLM, "serve", str(model), *arguments, *others]
    url = f"http://localhost:{port}"
    with server(command, url, CACHE / f"ruler-{port}.log"):
        yield url, record.command("vllm", *map(str, command[1:]))
