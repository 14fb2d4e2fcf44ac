"""Two long English texts, in the public domain, that packages bring along.

Jane Austen, Pride and Prejudice (120,000 words), comes with guidellm 0.3.1, a load generator
for LLM servers; Isaac Newton, Opticks (100,000 words), with apache-tvm-ffi, which vLLM needs.
Run as a script, this prints one.
"""

import argparse
import gzip
import re
from importlib.metadata import distribution

WORKS = {
    "pride-and-prejudice": ("guidellm", "guidellm/data/prideandprejudice.txt.gz"),
    "opticks": ("apache-tvm-ffi", "tvm_ffi/3rdparty/libbacktrace/Isaac.Newton-Opticks.txt"),
}


def load(work: str = "pride-and-prejudice") -> str:
    """A text of WORKS: one paragraph a line, a blank line between paragraphs."""
    package, file = WORKS[work]
    data = distribution(package).locate_file(file).read_bytes()
    text = (gzip.decompress(data) if file.endswith(".gz") else data).decode()
    text = re.sub(r"\[Illustration.*?\]\n\n", "", text, flags=re.DOTALL)
    paragraphs = re.split(r"\n{2,}", text.replace("_", ""))
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", nargs="?", choices=WORKS, default="pride-and-prejudice")
    print(load(parser.parse_args().work))
