"""With the plugin installed and another backend selected, vLLM is what it was without."""

import json
import os
import subprocess
import sys
from pathlib import Path

from prometheus_client import REGISTRY

from tests.helpers import checkpoints
from tests.helpers.inprocess import settle

ORDINARY = """
import json, sys
from tests.helpers import checkpoints
from tests.helpers.answers import generate, of_answer, of_prompt
from tests.helpers.inprocess import engine

if __name__ == "__main__":
    prompts = [checkpoints.tokens(n, n) for n in (3, 60, 100)]
    options = {"attention_backend": None, "block_size": 32, "max_model_len": 128}
    with engine(sys.argv[1], **options) as llm:
        outputs = generate(llm, prompts, max_tokens=20, prompt_logprobs=0)
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    answers = [(*map(list, of_answer(o)), list(of_prompt(o))) for o in outputs]
    print(json.dumps(["DCA" in AttentionBackendEnum.__members__, answers], default=float))
"""


def ordinary(model: Path, **environment: str) -> tuple[bool, list[object]]:
    """Whether DCA was there, and what vLLM's own attention answers."""
    run = subprocess.run(
        [sys.executable, "-c", ORDINARY, str(model)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        cwd=Path(__file__).parents[2],
    )
    assert run.returncode == 0, run.stderr[-3000:]
    registered, answers = json.loads(run.stdout.splitlines()[-1])
    return registered, answers


def test_ordinary_answers_are_the_same_to_the_last_bit(tmp_path: Path) -> None:
    # A head size that vLLM's own attention takes.
    model = checkpoints.write(tmp_path, "LlamaConfig", head_dim=32)
    installed, answers = ordinary(model)
    absent, expected = ordinary(model, VLLM_PLUGINS="")
    assert (installed, absent) == (True, False)
    assert answers == expected


def test_its_metrics_are_silent(tmp_path: Path) -> None:
    """`vllm serve` asks for them whatever the backend is."""
    from vllm.v1.engine import FinishReason
    from vllm.v1.metrics.stats import FinishedRequestStats, IterationStats

    from vllm_dca.engine.metrics import DcaStatLogger

    model = checkpoints.write_config(tmp_path, "LlamaConfig", "LlamaForCausalLM")
    step = IterationStats()
    step.finished_requests = [FinishedRequestStats(FinishReason.STOP, num_prompt_tokens=9)]
    silent = DcaStatLogger(settle(model, attention_backend=None, block_size=32))
    silent.record(None, step)
    samples = [sample for metric in REGISTRY.collect() for sample in metric.samples]
    assert not any(
        sample.name.startswith("vllm_dca:") and sample.labels.get("model_name") == str(model)
        for sample in samples
    )
    # Nor is there anything to say of a step without statistics.
    DcaStatLogger(settle(model)).record(None, None)
