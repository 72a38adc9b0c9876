import pytest

from castling_jax.training.timing import interleaved_seconds, medians, significant


def test_calls_take_turns_after_one_warm_up_each():
    calls = []
    seconds = interleaved_seconds({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=3)
    assert calls == ["a", "b"] * 4
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}


def test_median_of_each():
    assert medians({"a": [3, 1, 2], "b": [1, 2]}) == {"a": 2, "b": 1.5}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.00412, "0.00412"),
        (0.5, "0.500"),
        (1.734, "1.73"),
        (33.7, "33.7"),
        (1296.4, "1,296"),
        (0, "0"),
        (-0.1, "-0.100"),
    ],
)
def test_numbers_keep_their_first_digits(value, text):
    assert significant(value) == text
