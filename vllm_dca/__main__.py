"""`python -m vllm_dca`: the command line."""

from vllm_dca.cli import app

if __name__ == "__main__":
    app(prog_name="python -m vllm_dca")
