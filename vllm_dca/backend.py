"""Where the backend was; for configs that name it, until version 0.2."""

raise ImportError(
    "vllm_dca.backend.DcaBackend is vllm_dca.engine.backend.DcaBackend now. What named the old "
    "place was made with another version of vllm-dca: install the same one on every node, and "
    "write the new name where you wrote the old one."
)
