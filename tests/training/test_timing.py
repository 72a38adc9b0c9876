from castling_jax.training.timing import interleaved_seconds, medians


def test_calls_take_turns_after_one_warm_up_each():
    calls = []
    seconds = interleaved_seconds({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=3)
    assert calls == ["a", "b"] * 4
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}


def test_median_of_each():
    assert medians({"a": [3, 1, 2], "b": [1, 2]}) == {"a": 2, "b": 1.5}
