import re
import sys

import pytest

from castling_jax.tools import feeding


@pytest.mark.slow
def test_rates_of_reading_steps_and_both_are_printed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["feeding", "--config=configs/digits.py", "--batches=2", "--repeats=2"])
    feeding.main()
    printed = capsys.readouterr().out
    for name in ("reading", "steps", "both", "reading, CPU time"):
        least, median, greatest = (
            float(n.replace(",", "")) for n in re.search(rf"{name} +(\S+) +(\S+) +(\S+)", printed).groups()
        )
        assert 0 < least <= median <= greatest
    assert "times as fast as the steps" in printed
    assert f"the host sends {4 * 8 * 8 * 3 + 4} bytes for each image" in printed  # the digits' floats, and a label


@pytest.mark.parametrize(
    ("argument", "said"),
    [("--batches=0", "--batches must be at least 1, not 0."), ("--config=no.py", "no configuration file 'no.py'")],
)
def test_mistakes_are_one_sentence(monkeypatch, argument, said):
    monkeypatch.setattr(sys, "argv", ["feeding", argument])
    with pytest.raises(SystemExit) as exit:
        feeding.main()
    assert said in exit.value.code
