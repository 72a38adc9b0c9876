"""How the package refuses bad input: one sentence that names the value and what is allowed."""

import contextlib
import errno
import functools
import inspect
import os
import re
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import ParamSpec, TypeVar

from castling_jax.suggestions import group_of, suggest

LISTED = 20  # names, beside the nearest one
P = ParamSpec("P")
R = TypeVar("R")


class InputError(ValueError):
    """A caller's mistake. Its message is one complete sentence, fit to be shown without a traceback.

    Control characters are shown escaped: names of files, and names inside files, may hold any. Of several sentences,
    which `Mistakes` gives, each is a line of the message.
    """

    def __init__(self, *sentences: str):
        super().__init__(*map(printable, sentences))

    def __str__(self) -> str:
        return "\n".join(self.args)


def printable(text: object) -> str:
    """A text with its control characters, line breaks and lone surrogates escaped, as a name has to be for a log.

    A name with a line break would write lines of its own into the log, and one with escape sequences would command the
    terminal that shows it.
    """
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in str(text))


class DeterministicError(InputError):
    """A mistake that the same command, which goes on at the same place, would only come to again."""


def check_known(kind: str, name: object, known: Iterable[str]) -> None:
    """Refuses a name that is not one of those known.

    Args:
      kind: what is being named, for the message ("model", "attention", ...).
      name: the name that was given.
      known: the names that exist.

    Raises:
      InputError: `name` is not in `known`; the message names the nearest known one, and all where they are few.
    """
    choices = list(known)
    if name in choices:
        return
    nearest, nearby = suggest(str(name), choices), group_of(str(name), choices)
    listed = f" (known: {', '.join(nearby) or 'none'})" if not nearest or len(nearby) <= LISTED else ""
    hint = f": did you mean {nearest!r}?{listed}" if nearest else f"{listed}."
    raise InputError(f"unknown {kind} {name!r}{hint}")


def check_at_least(name: str, value: float, low: float) -> None:
    """Raises an InputError unless the value called `name` is `low` or more; NaN is not."""
    if not value >= low:
        raise InputError(f"{name} must be at least {low}, not {value}.")


def check_at_most(name: str, value: float, high: float, meaning: str) -> None:
    """Raises an InputError unless the value called `name` is at most `high`, which is `meaning`; NaN is not."""
    if not value <= high:
        raise InputError(f"{name} must be at most {meaning}, {high}, not {value}.")


def check_between(name: str, value: float, low: float, high: float) -> None:
    """Raises an InputError unless the value called `name` is from `low` to `high`; NaN is not."""
    if not low <= value <= high:
        raise InputError(f"{name} must be from {low} to {high}, not {value}.")


def takes(**kinds: tuple[type, str]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorates a public function so that arguments of another kind, such as two that are swapped, are refused.

    Args:
      **kinds: by the argument's name, its type and what it is, in words.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            for name, value in signature.bind(*args, **kwargs).arguments.items():
                kind, words = kinds.get(name, (object, ""))
                if not isinstance(value, kind):
                    raise InputError(f"{function.__name__} takes {words} as {name}, not {type(value).__name__}.")
            return function(*args, **kwargs)

        return run

    return decorate


@contextlib.contextmanager
def refusing(kinds: type[Exception] | tuple[type[Exception], ...], sentence: str) -> Iterator[None]:
    """Turns errors of these kinds inside the block into an InputError; an InputError passes as it is.

    Args:
      kinds: of errors that stand for bad input.
      sentence: what the person has to know, without its full stop; what the error says follows in brackets.

    Raises:
      InputError: the block raised an error of these kinds, which is its cause.
    """
    try:
        yield
    except InputError:
        raise
    except kinds as error:
        said = repr(error) if isinstance(error, LookupError) else in_one_sentence(error) or repr(error)
        if isinstance(error, OSError) and error.strerror:  # the system's words alone: the sentence names the path
            said = error.strerror
        raise InputError(f"{sentence} ({said}).") from error


@contextlib.contextmanager
def about(subject: str) -> Iterator[None]:
    """Puts `subject` and a colon before what an InputError inside the block says."""
    try:
        yield
    except InputError as error:
        raise type(error)(f"{subject}: {error}") from error


@contextlib.contextmanager
def refusing_os_errors() -> Iterator[None]:
    """Turns the system's errors inside the block into an InputError that names the path: a full disk, a lost folder.

    Raises:
      InputError: the block raised an OSError, which is its cause.
    """
    try:
        yield
    except OSError as error:
        raise InputError(system_sentence(error)) from error


def system_sentence(error: OSError) -> str:
    """What the system refuses, in a sentence that names the path where there is one."""
    said = error.strerror or in_one_sentence(error) or repr(error)
    if error.filename is None:
        return f"the system refuses to go on ({said})."
    return f"'{os.fsdecode(error.filename)}' cannot be read or written ({said})."


class Mistakes:
    """Collects mistakes, so that a person hears of all of them at once.

    Each `with mistakes:` block may raise one InputError; `report` raises them together.
    """

    def __init__(self) -> None:
        self._sentences: list[str] = []

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> bool:
        if isinstance(error, InputError):
            head, *sentences = str(error).splitlines()  # of several mistakes, which another one reported
            self._sentences += sentences or [head]
        return isinstance(error, InputError)

    def report(self) -> None:
        """Raises an InputError of all mistakes so far; does nothing where there are none."""
        if len(self._sentences) == 1:
            raise InputError(self._sentences[0])
        if self._sentences:
            raise InputError(f"{len(self._sentences)} mistakes:", *self._sentences)


def reason(error: Exception) -> str:
    """What another package's error says, cut to a line that fits into a sentence; of the system's, the system's."""
    for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS):
        if os.strerror(code) in str(error):  # TensorStore tells the whole way down to it
            return os.strerror(code)
    return (str(error).strip() or repr(error)).splitlines()[0][:300].rstrip(".")


def in_one_sentence(said: object) -> str:
    """What a library says, to stand in brackets."""
    return re.sub(r"[.!?]+ ", "; ", " ".join(str(said).split())).rstrip(".:")
