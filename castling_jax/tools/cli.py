"""What all commands share: the parser, --config and its fields, and the sentence that ends a command with a mistake."""

import argparse
import contextlib
import functools
import os
import re
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from etils import epath

from castling_jax.errors import InputError, check_at_least, refusing_os_errors
from castling_jax.storage import as_path
from castling_jax.suggestions import suggest

FIELD = re.compile(r"--?(?:no)?config\.[^=]+(=?)")  # --config.GROUP.FIELD=VALUE, or --noconfig.GROUP.FIELD

OVERRIDES = "--config.GROUP.FIELD=VALUE overrides a field of the configuration"


def program() -> str:
    """The command as it was started: main.py, castling-jax convert, python -m castling_jax.tools.convert."""
    module = sys.modules["__main__"].__spec__
    if module is not None and sys.argv[0] == module.origin:
        return f"python -m {module.name.removesuffix('.__main__')}"
    return Path(sys.argv[0]).name


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the description's lines, and ends an option's help with its default, if it has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        # Flags that are off, empty texts and lists, and None need no words.
        default = action.default
        is_shown = isinstance(default, int | float | str | Path) and default not in ("", argparse.SUPPRESS)
        return super()._get_help_string(action) if is_shown and default is not False else action.help


class Parser(argparse.ArgumentParser):
    """A command's parser, whose help begins with the module's docstring and gives each option's default.

    Nothing that a parser needs may import JAX: then --help answers at once.

    Args:
      doc: the docstring.
      fields: whether the command takes --config.GROUP.FIELD=VALUE. `options.fields` then has these words, for
        `castling_jax.training.overrides`.
    """

    def __init__(self, doc: str | None, *, fields: bool = False):
        epilog = f"{OVERRIDES} (python main.py --help-config lists the fields)" if fields else None
        super().__init__(
            prog=program(), description=doc, epilog=epilog, formatter_class=_HelpFormatter, allow_abbrev=False
        )
        self.takes_fields = fields
        self._counts: list[argparse.Action] = []

    def add_config(self, **options: Any) -> None:
        """Adds --config, which is None where it is not given and has no `default`."""
        self.add_argument(
            "--config", metavar="NAME", help="NAME or FILE.py, and :VARIANT: digits, deit:small", **options
        )

    def add_count(self, flag: str, default: int | None, help: str) -> None:
        """Adds a flag that takes an integer of at least 1, or may be missing (None); `read` refuses others."""
        self._counts.append(self.add_argument(flag, type=int, default=default, help=help))

    def error(self, message: str) -> NoReturn:
        """Raises an InputError; argparse calls this for a mistake."""
        raise InputError(f"{message}; --help lists what this command takes.")

    def read(self, words: Sequence[str] | None = None) -> Namespace:
        """The options of a command line, by default this process's.

        Raises:
          InputError: a flag is unknown, in which case the message names the nearest known one, or has a wrong value.
        """
        words = list(sys.argv[1:] if words is None else words)
        # argparse would take the fields for unknown flags: there are a hundred, and --help-config lists them.
        fields, others = _split(words) if self.takes_fields else ([], words)
        options, unknown = self.parse_known_args(others)
        for word in unknown:
            flag = word.partition("=")[0]
            if not flag.startswith("-"):
                self.error(f"unexpected argument {word!r}")
            raise InputError(f"unknown flag {flag}{self._hint(flag.lstrip('-'))}")
        for count in self._counts:
            if (value := getattr(options, count.dest)) is not None:
                check_at_least(count.option_strings[0], value, 1)
        if self.takes_fields:
            options.fields = fields
        return options

    def _hint(self, flag: str) -> str:
        known = [name.lstrip("-") for action in self._actions for name in action.option_strings]
        if self.takes_fields:
            from castling_jax.training.config import FIELDS

            known += [f"config.{field}" for field in FIELDS]
        nearest = suggest(flag, known)
        return f": did you mean --{nearest}?" if nearest else "; --help lists the flags."


def _split(words: list[str]) -> tuple[list[str], list[str]]:
    """The words that override fields, each with its value after "=", and the other words."""
    fields: list[str] = []
    others: list[str] = []
    lacks_value = False
    for word in words:
        field = FIELD.match(word)
        if field:
            fields.append(word)
        elif lacks_value and not word.startswith("--"):  # as in --config.seed 7
            fields[-1] += f"={word}"
        else:
            others.append(word)
        lacks_value = field is not None and not field[1]
    return fields, others


def any_path(text: str) -> epath.Path:
    """An argparse type: a path on this machine or in a bucket; ~ is the home folder."""
    try:
        return as_path(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def local_path(text: str) -> Path:
    """An argparse type: a path on this machine; ~ is the home folder."""
    return Path(any_path(text))


@contextlib.contextmanager
def ending_in_a_sentence(prefix: str = "") -> Iterator[None]:
    """Ends the process with status 1 and a sentence where the block raises an InputError or the system's error.

    A reader that left, as in `TOOL | head`, is no mistake.
    """
    try:
        with refusing_os_errors():
            try:
                yield
            finally:  # --help ends in a SystemExit, and its reader may have left too
                sys.stdout.flush()
    except InputError as error:
        if isinstance(error.__cause__, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python's flush at the end fails too
            sys.exit(0)
        sys.exit(f"{prefix}{error}")


def command(make_parser: Callable[[], Parser]) -> Callable[[Callable[[Namespace], None]], Callable[..., None]]:
    """Decorates a command's function of its options: main(words) reads the words, and a mistake ends in a sentence.

    Args:
      make_parser: makes the command's parser.
    """

    def decorate(run: Callable[[Namespace], None]) -> Callable[..., None]:
        @functools.wraps(run)
        @ending_in_a_sentence()
        def main(words: Sequence[str] | None = None) -> None:
            run(make_parser().read(words))

        return main

    return decorate


if __name__ == "__main__":
    sys.exit("cli is no command: python -m castling_jax lists the commands.")
