"""vLLM as the patches make it, and what it does then, in processes of its own."""
