"""Completions for a file of prompts by many engines with DCA, on a Ray cluster or one machine.

What schedules is Ray Data, and this is its configuration, to copy and edit; docs/ray.md says
what it does when something dies. PROMPTS is Parquet or JSONL with the columns `id`, unique, and
`prompt` or `prompt_token_ids`. OUTPUT is a folder that every node sees; it gets Parquet files
with the columns `id`, `text`, `token_ids` and `num_prompt_tokens`. The same command again goes
on from what is there. One run a folder at a time.
"""

import json
import os
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
import typer
from ray.data.llm import build_processor, vLLMEngineProcessorConfig


def read(prompts: Path) -> ray.data.Dataset:
    reader = ray.data.read_parquet if prompts.suffix == ".parquet" else ray.data.read_json
    return reader(str(prompts.resolve()))


def written_ids(output: Path) -> list[Any]:
    """Ids in the output; a file that a dead run left half-written is removed."""
    ids: list[Any] = []
    for path in output.glob("*.parquet"):
        try:
            ids += pq.read_table(path, columns=["id"])["id"].to_pylist()
        except pa.ArrowInvalid:  # Parquet's footer is written last
            path.unlink()
    return ids


def request(row: dict[str, Any]) -> dict[str, Any]:
    if "prompt_token_ids" in row:
        return {"tokenized_prompt": row["prompt_token_ids"]}
    return {"prompt": row["prompt"]}


def completion(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The row to write, or none for a prompt that the engine refused."""
    if error := row["__inference_error__"]:
        print(f"id {row['id']}: {error}")  # Ray shows it in the driver's terminal
        return []
    return [
        {
            "id": row["id"],
            "text": row["generated_text"],
            "token_ids": row["generated_tokens"],
            "num_prompt_tokens": row["num_input_tokens"],
        }
    ]


def main(
    model: str,
    prompts: Path,
    output: Path,
    max_model_len: Annotated[int, typer.Option(help="Longest prompt with its answer.")],
    max_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 256,
    temperature: float = 0.0,
    replicas: Annotated[int, typer.Option(help="Engines, each in an actor of its own.")] = 1,
    cores: Annotated[
        int, typer.Option(help="Run each engine on so many CPU cores, not on GPUs.")
    ] = 0,
    batch_size: Annotated[
        int, typer.Option(help="Prompts in a Ray task, and rows in an output file.")
    ] = 8,
    batches: Annotated[int, typer.Option(help="Ray tasks that an engine works on.")] = 8,
    engine_option: Annotated[
        str, typer.Option(help="JSON: anything else that vLLM's EngineArgs take.")
    ] = "{}",
) -> None:
    if cores and os.environ.get("RAY_ADDRESS", "local") == "local":
        # One more than the engines have, for reading and writing, which mostly wait for them.
        ray.init(num_cpus=replicas * cores + 1)
    ids = [row["id"] for row in read(prompts).select_columns(["id"]).iter_rows()]
    if len(set(ids)) < len(ids):
        raise typer.BadParameter("the ids in PROMPTS are not unique")
    output.mkdir(parents=True, exist_ok=True)
    done = written_ids(output)
    print(f"{len(ids)} prompts, {len(set(ids) & set(done))} answered already")
    if set(ids) <= set(done):
        return

    sampling = {"max_tokens": max_tokens, "temperature": temperature}
    processor = build_processor(
        vLLMEngineProcessorConfig(
            model_source=model,
            # By name, and last: where the plugin is missing the engine does not start, since
            # vLLM refuses a name that it does not know. No other backend can have answered.
            engine_kwargs={
                "max_model_len": max_model_len,
                **json.loads(engine_option),
                "attention_backend": "dca",
            },
            # A fixed pool. Ray Data's actors have max_restarts=-1 and max_task_retries=-1: one
            # that dies is started again, and does again what it had not returned.
            concurrency=(replicas, replicas),
            batch_size=batch_size,
            # Back-pressure: an engine works on so many batches and one more waits at it; Ray
            # Data sends the next when one is done, and reads no further ahead than it needs.
            max_concurrent_batches=batches,
            max_tasks_in_flight_per_actor=batches + 1,
            # Unless on cores: a GPU for each of tensor_parallel_size * pipeline_parallel_size.
            placement_group_config={"bundle_per_worker": {"CPU": cores}} if cores else None,
            # On cores: vLLM would bind every engine of a machine to the same ones, where Ray
            # sets OMP_NUM_THREADS to those that the actor asked for.
            runtime_env={"env_vars": {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}},
            # One prompt that is too long must not stop the others; `completion` names it.
            should_continue_on_error=True,
            # vLLM does both itself.
            chat_template_stage=False,
            tokenize_stage=False,
            detokenize_stage=False,
            log_engine_metrics=False,  # would need ray[serve]
        ),
        preprocess=lambda row: {**request(row), "sampling_params": sampling},
        # Other than the steps before ask for, so that Ray Data does not fuse them all into one,
        # which would put the blocks below together again.
        preprocess_map_kwargs={"num_cpus": 0.5},
    )
    answered = ray.put(pa.array(done))

    def unanswered(table: pa.Table) -> pa.Table:
        skip = ray.get(answered).cast(table["id"].type)
        return table.filter(pc.invert(pc.is_in(table["id"], skip)))

    rows = read(prompts).map_batches(unanswered, batch_format="pyarrow")
    # A block becomes a task, which is what a dead engine loses, and a file.
    rows = processor(rows.repartition(target_num_rows_per_block=batch_size))
    rows.flat_map(completion).write_parquet(str(output.resolve()))

    done = written_ids(output)
    missing, twice = len(set(ids) - set(done)), len(done) - len(set(done))
    print(f"{len(ids) - missing} of {len(ids)} prompts answered, {twice} twice")
    if missing or twice:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
