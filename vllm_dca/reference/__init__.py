"""The specification, in fp64; it shares no code with the rest; only cli and tests use it."""
