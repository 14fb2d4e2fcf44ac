"""Answers to a file of long prompts, offline, by one engine with Dual Chunk Attention.

PROMPTS is JSONL: `prompt`, and an `id` if you like (else the number of the line). OUTPUT gets a
line for each, in the same order: `id`, `text`, `finish_reason` (`length`: it was cut off) and
`num_prompt_tokens`; or `id` and `error` for a prompt that does not fit, which stops no other.
Prompts go to the model as they are, without its chat template. OUTPUT is written at the end:
for many engines, or a run that must outlive a crash, take ray_batch.py.
"""

import json
import time
from pathlib import Path
from typing import Annotated

import typer
from vllm import LLM, SamplingParams


def main(
    model: str,
    prompts: Annotated[Path, typer.Argument(exists=True, dir_okay=False)],
    output: Annotated[Path, typer.Argument(dir_okay=False)],
    max_model_len: Annotated[int, typer.Option(help="Longest prompt with its answer.")],
    max_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 256,
    dtype: str = "auto",
    tensor_parallel_size: Annotated[int, typer.Option(help="GPUs that share it.")] = 1,
    engine_option: Annotated[
        str, typer.Option(help="JSON: anything else that vLLM's EngineArgs take.")
    ] = "{}",
) -> None:
    # What is wrong with the files should show before the model is loaded.
    with prompts.open(encoding="utf-8") as file:
        lines = [(number, line) for number, line in enumerate(file, 1) if line.strip()]
    rows = []
    for number, line in lines:
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise typer.BadParameter(f"line {number} is no JSON: {error}") from error
        if not isinstance(row, dict):
            raise typer.BadParameter(
                f"line {number} is no JSON object but {line.strip()[:40]}; one would be "
                '{"prompt": "Once upon a time"}'
            )
        rows.append({"id": number, **row})
    if wrong := [row["id"] for row in rows if not isinstance(row.get("prompt"), str)]:
        raise typer.BadParameter(f"no text as `prompt` in {wrong}")
    output.parent.mkdir(parents=True, exist_ok=True)

    llm = LLM(
        model,
        attention_backend="dca",
        max_model_len=max_model_len,  # with DCA, several times the model's window
        dtype=dtype,
        tensor_parallel_size=tensor_parallel_size,
        **json.loads(engine_option),
    )
    # vLLM would end the whole run at a prompt that leaves no room for an answer.
    tokenizer = llm.get_tokenizer()
    tokens = [tokenizer(row["prompt"])["input_ids"] for row in rows]
    fit = [at for at, prompt in enumerate(tokens) if 0 < len(prompt) < max_model_len]
    start = time.perf_counter()
    generated = llm.generate(
        [{"prompt_token_ids": tokens[at]} for at in fit],
        SamplingParams(temperature=0, max_tokens=max_tokens),
    )
    seconds = time.perf_counter() - start

    answers = {at: request.outputs[0] for at, request in zip(fit, generated, strict=True)}
    with output.open("w", encoding="utf-8") as file:
        for at, row in enumerate(rows):
            length = len(tokens[at])
            if answer := answers.get(at):
                result = {
                    "text": answer.text,
                    "finish_reason": answer.finish_reason,
                    "num_prompt_tokens": length,
                }
            else:
                most = max_model_len - 1
                reason = f"too long: {length} tokens, at most {most} fit" if length else "empty"
                result = {"error": f"the prompt is {reason}"}
            file.write(json.dumps({"id": row["id"], **result}, ensure_ascii=False) + "\n")
    read = sum(len(tokens[at]) for at in fit)
    written = sum(len(answer.token_ids) for answer in answers.values())
    print(f"{len(fit)} of {len(rows)} prompts answered in {seconds:.2f} s")
    print(f"{read / seconds:.2f} prompt tokens/s, {written / seconds:.2f} answer tokens/s")


if __name__ == "__main__":
    typer.run(main)
