"""What a server does when something breaks; `__main__` is the command.

- `served`: a server of a tiny model, its processes and its answers.
- `processes`: what is killed under load, and a KV cache that is full.
- `kernel`: a compiler or a disk that fails, a damaged library, two that compile at once.
"""
