import random

import pytest

from castling_jax.bench.faults import Kill, Pod, describe, kill_somehow
from castling_jax.errors import InputError


class Ended(Pod):
    """A run that came to its end before anything could be done to it."""

    def __init__(self):
        pass

    def wait_until(self, condition):
        return False


def test_a_run_that_has_ended_cannot_be_killed():
    assert all(kill_somehow(Ended(), random.Random(seed), processes=2) is None for seed in range(8))


@pytest.mark.parametrize(("hashes", "said"), [({"a"}, "the same, bit for bit,"), ({"a", "b"}, "NOT the same")])
def test_the_page_says_what_came_of_it(hashes, said):
    page = describe([Kill("one", 12.34, 7, 0.56, 1)], 2, "a", hashes)
    assert said in page
    assert "| 1 | one | 12.3 | 7 | 0.6 | 1 |" in page


@pytest.mark.slow
def test_a_run_that_did_not_end_says_its_last_words(tmp_path):
    pod = Pod(tmp_path / "run", processes=1, flags=("--config.model.name=deit_micr",))
    assert pod.wait() == 1
    with pytest.raises(InputError, match="did not reach its end, and said: .* did you mean 'deit_micro'?"):
        pod.sha256()
