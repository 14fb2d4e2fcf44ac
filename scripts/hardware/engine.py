"""`vllm bench latency` with DCA, and with the attention that vLLM itself chooses.

Usage: python -m scripts.hardware.engine [--dry-run] [--output FILE]

A model of Llama-3-8B's shape with random weights, graphs and torch.compile on, each case with
either, in a process of its own. Each must say in its log which attention ran. --dry-run has
every command's arguments read by vLLM, and runs none.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from scripts.common import record

WINDOW, LONGEST = 8192, 69_632
DCA = re.compile(r"DCA attends \d+ layers.*?prefill by (\w+)", re.DOTALL)
OWN = re.compile(r"Using (\w+) attention backend")


class Case(NamedTuple):
    """A batch of prompts, and how much is answered."""

    batch: int
    prompt: int
    answer: int


# The first of each pair is nearly all prefill; what the second takes more is decode.
CASES = [Case(*of) for of in ((1, 8192, 1), (1, 8192, 129), (1, 65_536, 1), (1, 65_536, 129),
                              (8, 8192, 1), (8, 8192, 129))]  # fmt: skip


def write_model(directory: Path) -> Path:
    """A config of Llama-3-8B's shape; vLLM makes the weights up."""
    from transformers import LlamaConfig

    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=WINDOW,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5},
        dtype="bfloat16",
    ).save_pretrained(directory)
    return directory


def arguments(case: Case, model: Path, by: str, output: Path) -> list[str]:
    """Of `vllm bench latency`."""
    found = {
        "model": model,
        "load-format": "dummy",
        "max-model-len": LONGEST,
        "input-len": case.prompt,
        "output-len": case.answer,
        "batch-size": case.batch,
        "num-iters-warmup": 2,
        "num-iters": 5,
        "output-json": output,
    }
    if by == "DCA":
        found["attention-backend"] = "DCA"
    else:
        # Positions past the window, so that as many are attended to.
        found["hf-overrides"] = json.dumps({"max_position_embeddings": LONGEST})
    options = [word for name, value in found.items() for word in (f"--{name}", str(value))]
    return [*options, "--skip-tokenizer-init", "--disable-detokenize"]


def ran(log: str, by: str) -> str:
    """Which attention a log says, as it was asked for.

    Raises:
        RuntimeError: another, or it does not say.
    """
    dca, own = DCA.search(log), OWN.search(log)
    if by == "DCA" and dca:
        return f"DCA ({dca[1]})"
    if by != "DCA" and own and not dca:
        return own[1]
    raise RuntimeError(f"asked for {by}, and the log does not say that it ran")


def measure(case: Case, model: Path, by: str) -> dict[str, Any]:
    output = model / "latency.json"
    output.unlink(missing_ok=True)
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "bench", "latency"]
    done = subprocess.run(
        [*command, *arguments(case, model, by, output)],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    print(done.stdout, flush=True)
    if done.returncode:
        raise RuntimeError(f"vllm bench ended with status {done.returncode}")
    latency = json.loads(output.read_text())
    return {"ran": ran(done.stdout, by), "seconds": latency["percentiles"]}


def read_by_vllm(case: Case, model: Path, by: str) -> dict[str, Any]:
    """What vLLM makes of a command's arguments."""
    from vllm.benchmarks.latency import add_cli_args
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    read = parser.parse_args(arguments(case, model, by, model / "latency.json"))
    engine = EngineArgs.from_cli_args(read)
    return {"max_model_len": engine.max_model_len, "backend": str(engine.attention_backend)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="arguments only")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    run = read_by_vllm if args.dry_run else measure
    journal = record.Journal(args.output, record.provenance("vllm", "vllm-dca", "transformers"))
    with tempfile.TemporaryDirectory() as directory:
        model = write_model(Path(directory))
        for case in CASES:
            for by in ("DCA", "vLLM's own"):
                with journal.attempt(f"{case}, {by}"):
                    journal.add({**case._asdict(), "by": by, **run(case, model, by)})
                    print(journal.results[-1], flush=True)
    journal.end()


if __name__ == "__main__":
    main()
