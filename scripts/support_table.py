"""Write the README's support table anew from what vllm_dca declares and refuses."""

from pathlib import Path

from vllm_dca.support import table

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- support table: scripts/support_table.py -->\n", "<!-- end -->\n"


def rewritten(text: str) -> str:
    """The README with the table that is true now."""
    before, _, rest = text.partition(BEGIN)
    return before + BEGIN + table() + END + rest.partition(END)[2]


if __name__ == "__main__":
    README.write_text(rewritten(README.read_text()))
