"""What a server does when something breaks; `__main__` is the command.

- `served`: servers of a tiny model, and their answers.
- `processes`: what is killed under load, and a KV cache that is full.
- `kernel`: a compiler or a disk that fails, a damaged library, two that compile at once.
"""
