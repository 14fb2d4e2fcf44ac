"""With the plugin installed and another backend selected, vLLM is what it was without."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.helpers import checkpoints
from tests.helpers.answers import generate, of_answer, of_prompt
from tests.helpers.inprocess import engine

ROOT = Path(__file__).parents[2]
WITHOUT_PLUGIN = """
import json, sys
from pathlib import Path
from tests.engine.test_unselected import ordinary

if __name__ == "__main__":
    print(json.dumps(ordinary(Path(sys.argv[1]))))
"""


def ordinary(model: Path) -> list[Any]:
    """Whether DCA is there, and what vLLM's own attention answers."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    prompts = [checkpoints.tokens(n, n) for n in (3, 60, 100)]
    options = {"attention_backend": None, "block_size": 32, "max_model_len": 128}
    with engine(model, **options) as llm:
        outputs = generate(llm, prompts, max_tokens=20, prompt_logprobs=0)
    answers = [[*map(list, of_answer(o)), list(of_prompt(o))] for o in outputs]
    found = ["DCA" in AttentionBackendEnum.__members__, answers]
    return json.loads(json.dumps(found, default=float))


def test_ordinary_answers_are_the_same_to_the_last_bit(tmp_path: Path) -> None:
    # A head size that vLLM's own attention takes.
    model = checkpoints.write(tmp_path, "LlamaConfig", head_dim=32)
    installed, answers = ordinary(model)
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_PLUGIN, str(model)],
        capture_output=True,
        text=True,
        env={**os.environ, "VLLM_PLUGINS": ""},
        cwd=ROOT,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    absent, expected = json.loads(run.stdout.splitlines()[-1])
    assert (installed, absent) == (True, False)
    assert answers == expected
