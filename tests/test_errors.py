"""Sentences: what a file or its content is called reaches a log or a terminal as printable text alone."""

import pickle

import pytest

from castling_jax.errors import InputError, Mistakes, printable, refusing, refusing_os_errors


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("a\nError: all is lost", "a\\nError: all is lost"),
        ("\x1b[2Ja", "\\x1b[2Ja"),
        ("a\rb\tc\0", "a\\rb\\tc\\x00"),
        ("\x9b31m", "\\x9b31m"),
        ("invoice\u202egpj.exe", "invoice\\u202egpj.exe"),
        ("a\u2028b", "a\\u2028b"),
        ("\udcff", "\\udcff"),  # how Python has a file's name that is no UTF-8
        ("Zoë's Bilder 写真.png", "Zoë's Bilder 写真.png"),
    ],
)
def test_control_characters_are_shown_escaped(name, shown):
    assert printable(name) == shown
    assert str(InputError(f"'{name}' is a file.")) == f"'{shown}' is a file."
    with pytest.raises(InputError) as caught, refusing(OSError, f"'{name}' cannot be read"):
        raise FileNotFoundError(2, name)
    assert shown in str(caught.value)
    str(caught.value).encode()


def test_of_several_mistakes_each_keeps_its_line():
    mistakes = Mistakes()
    for name in ("a\nb", "c"):
        with mistakes:
            raise InputError(f"{name} is wrong.")
    with pytest.raises(InputError) as caught:
        mistakes.report()
    assert str(caught.value) == "2 mistakes:\na\\nb is wrong.\nc is wrong."
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)  # from another process


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (NotADirectoryError(20, "Not a directory", "a\n/b"), "'a\\n/b' cannot be read or written (Not a directory)."),
        (OSError(28, "No space left on device"), "the system refuses to go on (No space left on device)."),
        (OSError("broken"), "the system refuses to go on (broken)."),
    ],
)
def test_the_systems_errors_are_sentences(error, sentence):
    with pytest.raises(InputError) as caught, refusing_os_errors():
        raise error
    assert (str(caught.value), caught.value.__cause__) == (sentence, error)
