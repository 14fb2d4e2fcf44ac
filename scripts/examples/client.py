"""Ask a server a question about a long document, and read the answer as it is written.

    vllm serve MODEL --served-model-name smollm2 --attention-backend dca --max-model-len 32768
    python client.py DOCUMENT.txt "Who is Mr Darcy?" --model smollm2

The document goes first and the question last, so that the next question about the document
begins with the same text. The server has that in its prefix cache: it reads little more than
the question, and answers at once.
"""

import os
import time
from pathlib import Path
from typing import Annotated

import openai
import typer

SERVE = "vllm serve MODEL --attention-backend dca --max-model-len TOKENS"


def failed(error: openai.APIError, url: str) -> str:
    """What went wrong, and what would work."""
    if isinstance(error, openai.APIConnectionError):
        return f"No server answers at {url}, or it went away. Start one: {SERVE}"
    if error.param in ("input_tokens", "input_text"):
        return (
            f"The document is too long for this server: {error.message}\n"
            "Cut it, or start the server for more tokens (with DCA, several times the model's "
            f"window): {SERVE}"
        )
    return f"{url}: {error.message}"


def main(
    document: Annotated[Path, typer.Argument(exists=True, dir_okay=False)],
    question: str,
    url: Annotated[str, typer.Option(help="Ends in /v1.")] = "http://localhost:8000/v1",
    model: Annotated[str, typer.Option(help="Its name on the server.")] = "smollm2",
    max_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 256,
) -> None:
    text = document.read_text(encoding="utf-8", errors="replace")
    client = openai.OpenAI(
        base_url=url,
        api_key=os.environ.get("OPENAI_API_KEY", "none"),
        # A long document may be read for minutes before the answer begins: wait, and do not
        # send it again.
        timeout=openai.Timeout(None, connect=10),
        max_retries=0,
    )
    start = time.perf_counter()
    first = usage = finish = None
    try:
        for chunk in client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": f"{text}\n\n{question}"}],
            max_tokens=max_tokens,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        ):
            usage = chunk.usage or usage  # of the last chunk, which has no choices
            for choice in chunk.choices:
                finish = choice.finish_reason
                if choice.delta.content:
                    first = first or time.perf_counter()
                    print(choice.delta.content, end="", flush=True)
    except openai.APIError as error:
        typer.echo(("\n" if first else "") + failed(error, url), err=True)
        raise typer.Exit(1) from error
    print()
    if first and usage:
        said = f"{usage.prompt_tokens} prompt tokens, first token after {first - start:.2f} s"
        cut = ", the answer was cut off" if finish == "length" else ""
        typer.echo(said + cut, err=True)


if __name__ == "__main__":
    typer.run(main)
