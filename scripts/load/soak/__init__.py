"""A server under load for a while; `__main__` is the command.

- `plan`: how much is asked, and which questions have known answers.
- `client`: what is sent to the server, and what it answers.
- `traffic`: the load, the questions, and clients that mean no good.
- `watch`: memory and metrics while that lasts, and what must be true at its end.
"""
