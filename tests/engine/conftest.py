"""What tests of engines share beside ../conftest.py."""

from tests.helpers.inprocess import models_are_inspected_here

__all__ = ["models_are_inspected_here"]
