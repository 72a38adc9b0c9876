import sys

import pytest

from castling_jax.models.attention.kinds import KINDS


@pytest.fixture(autouse=True)
def _forget_studies():
    """A study's file registers attentions of its own, which other tests must not meet."""
    kinds, modules = dict(KINDS), set(sys.modules)
    yield
    KINDS.clear()
    KINDS.update(kinds)
    for name in sys.modules.keys() - modules:
        if name.startswith("experiments.studies."):
            del sys.modules[name]
