"""Dual Chunk Attention for vLLM: `vllm serve MODEL --attention-backend dca`."""
