"""Marks that parameters of tests share."""

import pytest


def slow(*values):
    """A parameter set that only `make test-slow` runs, where a quicker sibling runs every day."""
    return pytest.param(*values, marks=pytest.mark.slow)
