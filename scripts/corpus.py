"""A long real English text: Jane Austen, Pride and Prejudice (public domain, 120,000 words).

It comes with the package guidellm 0.3.1, a load generator for LLM servers. Run as a script,
this prints it.
"""

import gzip
import re
from importlib.metadata import distribution
from pathlib import Path


def load() -> str:
    """The novel as plain text: one paragraph a line, a blank line between paragraphs."""
    path = Path(distribution("guidellm").locate_file("guidellm/data/prideandprejudice.txt.gz"))
    text = gzip.decompress(path.read_bytes()).decode()
    text = re.sub(r"\[Illustration.*?\]\n\n", "", text, flags=re.DOTALL)
    paragraphs = re.split(r"\n{2,}", text.replace("_", ""))
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


if __name__ == "__main__":
    print(load())
