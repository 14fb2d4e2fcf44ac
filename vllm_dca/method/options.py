"""Checks of values that several of the user's options share."""

# Positions are 32-bit numbers.
MOST_TOKENS = 2**31 - 1


def token_count(key: str, value: object, least: int = 1) -> int:
    """The value of an option that is a number of tokens.

    Args:
        key: the option's name.
        value: as it was given.
        least: 0 or 1.

    Raises:
        ValueError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        number = "a positive number" if least else "a number"
        raise ValueError(f"DCA's {key} must be {number} of tokens, not {value!r}.")
    if value > MOST_TOKENS:
        raise ValueError(f"DCA's {key} must be {MOST_TOKENS} tokens at most, not {value}.")
    return value


def share(key: str, value: object) -> float:
    """The value of an option that is a share.

    Args:
        key: the option's name.
        value: as it was given.

    Raises:
        ValueError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"DCA's {key} must be a number, not {value!r}.")
    if not 0 < value <= 1:
        raise ValueError(f"DCA's {key} must be above 0 and up to 1, not {value}.")
    return value
