"""Dual Chunk Attention for vLLM: `vllm serve MODEL --attention-backend dca`.

Read it in this order:

- `reference`: the specification, in fp64, slow and plain.
- `method`: the same as vLLM's paged cache needs it: geometry, rotary tables, plans, passes.
- `cpu`, `cuda`: how a device computes it; mostly the same file names in both.
- `engine`: all that touches vLLM: start-up checks, remap of positions, backend, shims.
- `cli`: `explain`, `calibrate` and `doctor`.
- `plugin`: what vLLM calls.
"""
