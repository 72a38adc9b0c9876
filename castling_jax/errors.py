"""How the package refuses bad input: one sentence that names the value and what is allowed."""

import contextlib
import errno
import functools
import inspect
import os
import re
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType, UnionType
from typing import ParamSpec, TypeVar

from castling_jax.suggestions import group_of, suggest

LISTED = 20  # an error lists all known names if there are at most so many; otherwise only the nearest one
P = ParamSpec("P")
R = TypeVar("R")


class InputError(ValueError):
    """A caller's mistake. Its message is one complete sentence, fit to be shown without a traceback.

    Control characters are escaped, because file names, and names inside files, may contain any. `Mistakes` passes
    several sentences; each becomes a line of the message.
    """

    def __init__(self, *sentences: str):
        super().__init__(*map(printable, sentences))

    def __str__(self) -> str:
        return "\n".join(self.args)


def printable(text: object) -> str:
    """Escapes control characters, line breaks and lone surrogates, so that a name can be logged safely.

    A name with a line break would add lines of its own to the log, and a name with escape sequences would control the
    terminal that shows it.
    """
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in str(text))


class DeterministicError(InputError):
    """A mistake that running the same command again would only repeat, because it resumes at the same place."""


def check(condition: object, sentence: str) -> None:
    """Raises an InputError with this sentence unless the condition holds.

    Python builds the sentence in either case: where building it is slow or may fail, write `if` and `raise` instead.
    """
    if not condition:
        raise InputError(sentence)


def check_known(kind: str, name: object, known: Iterable[str]) -> None:
    """Refuses an unknown name.

    Args:
      kind: what the name stands for, used in the message ("model", "attention", ...).
      name: the name to check.
      known: the names that exist.

    Raises:
      InputError: `name` is not in `known`; the message gives the nearest known name, and all known names if they are
        few.
    """
    choices = list(known)
    if name in choices:
        return
    # The whole configuration has a hundred fields: only those in the group that was meant are worth listing.
    nearest, nearby = suggest(str(name), choices), group_of(str(name), choices)
    listed = f" (known: {', '.join(nearby) or 'none'})" if not nearest or len(nearby) <= LISTED else ""
    hint = f": did you mean {nearest!r}?{listed}" if nearest else f"{listed}."
    raise InputError(f"unknown {kind} {name!r}{hint}")


def check_at_least(name: str, value: float, low: float) -> None:
    """Raises an InputError unless the value called `name` is at least `low`; NaN is refused."""
    check(value >= low, f"{name} must be at least {low}, not {value}.")


def check_at_most(name: str, value: float, high: float, meaning: str) -> None:
    """Raises an InputError unless the value called `name` is at most `high`, in words `meaning`; NaN is refused."""
    check(value <= high, f"{name} must be at most {meaning}, {high}, not {value}.")


def check_between(name: str, value: float, low: float, high: float) -> None:
    """Raises an InputError unless the value called `name` is from `low` to `high`; NaN is refused."""
    check(low <= value <= high, f"{name} must be from {low} to {high}, not {value}.")


def takes(**kinds: tuple[type | UnionType, str]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorates a public function so that it refuses arguments of the wrong type, such as two swapped arguments.

    Args:
      **kinds: argument name -> (the type that the argument must have, that type in words for the message).
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            for name, value in signature.bind(*args, **kwargs).arguments.items():
                kind, words = kinds.get(name, (object, ""))  # an argument without an entry may be anything
                if not isinstance(value, kind):
                    raise InputError(f"{function.__name__} takes {words} as {name}, not {type(value).__name__}.")
            return function(*args, **kwargs)

        return run

    return decorate


@contextlib.contextmanager
def refusing(kinds: type[Exception] | tuple[type[Exception], ...], sentence: str) -> Iterator[None]:
    """Turns errors of these kinds inside the block into an InputError; an InputError passes unchanged.

    Args:
      kinds: the exceptions that mean bad input.
      sentence: what the user has to know, without a full stop; the error's own message follows in brackets.

    Raises:
      InputError: the block raised one of these exceptions, which becomes the cause.
    """
    try:
        yield
    except InputError:  # before `kinds`, which often has ValueError in it: an InputError is one
        raise
    except kinds as error:
        # A KeyError's text is the bare key, which explains nothing without the class's name.
        detail = repr(error) if isinstance(error, LookupError) else in_one_sentence(error) or repr(error)
        if isinstance(error, OSError) and error.strerror:  # without the path, which `sentence` names
            detail = error.strerror
        raise InputError(f"{sentence} ({detail}).") from error


@contextlib.contextmanager
def about(subject: str) -> Iterator[None]:
    """Prefixes the message of an InputError raised inside the block with `subject` and a colon."""
    try:
        yield
    except InputError as error:
        # The same type: a DeterministicError has to remain one, or the command would be run again.
        raise type(error)(f"{subject}: {error}") from error


@contextlib.contextmanager
def refusing_os_errors() -> Iterator[None]:
    """Turns an OSError inside the block, such as a full disk or a missing folder, into an InputError with the path.

    Raises:
      InputError: the block raised an OSError, which becomes the cause.
    """
    try:
        yield
    except OSError as error:
        raise InputError(system_sentence(error)) from error


def system_sentence(error: OSError) -> str:
    """The operating system's error as a sentence, which names the path if the error has one."""
    detail = error.strerror or in_one_sentence(error) or repr(error)
    if error.filename is None:
        return f"the system refuses to go on ({detail})."
    return f"'{os.fsdecode(error.filename)}' cannot be read or written ({detail})."


class Mistakes:
    """Collects mistakes, so that a user learns about all of them at once.

    Each `with mistakes:` block may raise one InputError; `report` raises them together.
    """

    def __init__(self) -> None:
        self._sentences: list[str] = []

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> bool:
        if isinstance(error, InputError):
            # Another `Mistakes` may have reported several; its first line, "3 mistakes:", is not a mistake.
            head, *sentences = str(error).splitlines()
            self._sentences += sentences or [head]
        return isinstance(error, InputError)

    def report(self) -> None:
        """Raises one InputError with all mistakes so far; does nothing if there are none."""
        if len(self._sentences) == 1:
            raise InputError(self._sentences[0])
        if self._sentences:
            raise InputError(f"{len(self._sentences)} mistakes:", *self._sentences)


def reason(error: Exception) -> str:
    """Another package's error, cut to one line that fits into a sentence; a system error in the system's words."""
    for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS):
        if os.strerror(code) in str(error):  # TensorStore puts the whole call chain around it
            return os.strerror(code)
    return (str(error).strip() or repr(error)).splitlines()[0][:300].rstrip(".")


def in_one_sentence(message: object) -> str:
    """A library's message as part of a sentence: on one line, with semicolons between its sentences."""
    return re.sub(r"[.!?]+ ", "; ", " ".join(str(message).split())).rstrip(".:")
