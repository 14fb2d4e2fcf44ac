"""Print what pip is told, as uv is told it: a shell's `export` lines.

Usage: python pip_settings.py, by the Python whose pip it is. It needs nothing else installed.

uv reads neither pip's files nor its variables. The exit code is 1 if pip is told something that
has no name here, such as a client's certificate: then pip must install.
"""

import ast
import shlex
import subprocess
import sys

NAMES = {
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "find-links": "UV_FIND_LINKS",
    "constraint": "UV_CONSTRAINT",
    "cert": "SSL_CERT_FILE",
    "default-timeout": "UV_HTTP_TIMEOUT",
    "timeout": "UV_HTTP_TIMEOUT",
}
# Of what pip says, keeps or asks, not of what it installs.
HARMLESS = {
    *("cache-dir", "disable-pip-version-check", "no-cache-dir", "no-color", "no-input"),
    *("progress-bar", "quiet", "require-virtualenv", "root-user-action", "verbose"),
}


def told(listed: str) -> dict[str, str]:
    """Names and values, from what `pip config list` prints; the later of these wins."""
    found: dict[str, dict[str, str]] = {"global": {}, "install": {}, ":env:": {}}
    for line in listed.splitlines():
        key, _, value = line.partition("=")
        section, _, name = key.rpartition(".")
        if section in found:
            found[section][name] = ast.literal_eval(value)
    return {name: value for of in found.values() for name, value in of.items()}


def exports(settings: dict[str, str]) -> list[str]:
    """Lines for a shell.

    Raises:
        KeyError: uv cannot be told one of them.
    """
    # As pip does: the best version wherever it is.
    variables = {"UV_INDEX_STRATEGY": "unsafe-best-match"}
    for name in settings.keys() - HARMLESS:
        between = "," if name == "find-links" else " "
        variables[NAMES[name]] = between.join(settings[name].split())
    return [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]


if __name__ == "__main__":
    command = [sys.executable, "-m", "pip", "config", "list"]
    try:
        print(*exports(told(subprocess.check_output(command, text=True))), sep="\n")
    except KeyError as unnamed:
        sys.exit(f"{unnamed} of pip's settings is none of uv's")
