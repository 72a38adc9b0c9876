import pytest

from castling_jax.bench import startup


@pytest.mark.slow
def test_a_second_start_has_the_same_parts():
    starts = startup.measure_starts("digits", 1)
    assert list(starts) == list(startup.STARTS)
    first, second = starts.values()
    assert first.keys() == second.keys()
    assert all(seconds >= 0 for parts in starts.values() for seconds in parts.values())
    lines = startup.describe_starts(starts)
    assert len(lines) == len(first) + 2
    assert lines[-1].split()[0] == "together"


def test_what_cannot_start_is_said_before_anything_does(refuses, monkeypatch):
    monkeypatch.setattr(startup.subprocess, "run", None)
    with refuses("unknown configuration 'digit'", "did you mean 'digits'?"):
        startup.measure_starts("digit", 1)
