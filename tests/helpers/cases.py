"""How many random cases a property is tried on."""

import os


def cases(usual: int) -> int:
    """`usual`, or as many as scripts/quality/cases.py wants."""
    return int(os.environ.get("DCA_CASES", usual))
