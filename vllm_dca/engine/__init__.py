"""All that imports vLLM: the backend, what prepares its steps, start-up checks, shims."""
