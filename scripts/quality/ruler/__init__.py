"""RULER's tasks that need no data but a text (Hsieh et al. 2024, https://arxiv.org/abs/2404.06654).

- `words`: names, numbers and words for the tasks, by a seed.
- `needles`, `tracking`, `counting`: the tasks.
- `tasks`: their list, how long a text is, and how an answer scores.
- `served`: a server that answers.
"""
