"""How a command ends that cannot go on: in two lines, or with ``--debug`` in its traceback."""

from __future__ import annotations

import os
import re
import select
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from lightning_align._compat.jsonargparse_parsing import failures_recorded

DEBUG = "--debug"
_SWITCH = "LIGHTNING_ALIGN_DEBUG"
_REFUSAL = re.compile(r"[\w.]+\(\w+=.*\): ", re.DOTALL)
_LONGEST = 400  # characters of a message that is not ours
_TOLD_BARE = ("ValueError", "MisconfigurationException", "OSError", "FileNotFoundError")


def debugging() -> bool:
    """Whether tracebacks are asked for."""
    return "true" in (os.environ.get(_SWITCH), os.environ.get("JSONARGPARSE_DEBUG"))


@contextmanager
def debug_if_asked(words: Sequence[str]) -> Iterator[list[str]]:
    """The words of a command line without ``--debug``, which holds as long as the context.

    Args:
        words: As they were given.
    """
    rest = [word for word in words if word != DEBUG]
    before = os.environ.get(_SWITCH)
    if len(rest) < len(words):
        show_tracebacks()
    try:
        yield rest
    finally:
        if before is None:
            os.environ.pop(_SWITCH, None)
        else:
            os.environ[_SWITCH] = before


def show_tracebacks() -> None:
    """Ask for tracebacks, also of processes that are started."""
    os.environ[_SWITCH] = "true"


@contextmanager
def refusals_raised() -> Iterator[None]:
    """Raise what a constructor has raised, in place of the error that the parser makes of it."""
    failed: list[tuple[type, Exception]] = []
    try:
        with failures_recorded(failed):
            yield
    except Exception as error:
        for _, raised in reversed(failed):
            if raised is not error and _is_behind(raised, error):
                raise raised from None
        raise


@contextmanager
def refusals_told(program: str, *, everything: bool = False) -> Iterator[None]:
    """End the program with what a class refuses, in place of a traceback.

    Args:
        program: Name that the line begins with.
        everything: Whether any error is the user's, as it is while classes are built; else only
            refusals, and what a constructor of the configuration has raised.

    Raises:
        Exception: If it is none of these, or tracebacks are asked for.
    """
    failed: list[tuple[type, Exception]] = []
    try:
        with failures_recorded(failed):
            yield
    except Exception as error:
        reason = _reason(error, failed, everything)
        if reason is None or debugging():
            raise
        sys.exit(f"{program}: {reason}\nWhere it was raised: add {DEBUG}.")


@contextmanager
def readers_may_leave() -> Iterator[None]:
    """End without a word once nobody reads what is printed, as in ``plan ... | head``.

    Raises:
        BrokenPipeError: If it is of another pipe than the standard output.
    """
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError as error:
        if not _nobody_reads():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes again
        ended = error.__context__
        sys.exit(ended.code if isinstance(ended, SystemExit) else 1)


def _nobody_reads() -> bool:
    """Whether the standard output is a pipe that has no other end."""
    if not hasattr(select, "poll"):  # Windows
        return False
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)  # errors are told unasked
    return bool(poll.poll(0))


def refusal(error: BaseException) -> str | None:
    """What a class refused, ``where(argument=value): rule``, of all that the parser makes of it."""
    return next((str(each) for each in reversed(_causes(error)) if is_refusal(each)), None)


def is_refusal(error: BaseException) -> bool:
    """Whether the error is ours, about an argument."""
    return isinstance(error, ValueError) and _REFUSAL.match(str(error)) is not None


def _reason(
    error: Exception, failed: Sequence[tuple[type, Exception]], everything: bool
) -> str | None:
    """What the user is told; None for what is no mistake of theirs."""
    if (reason := refusal(error)) is not None:
        return reason
    chain = _causes(error)
    for cls, raised in reversed(failed):
        if _is_behind(raised, error):
            line = in_a_line(raised)
            return line if line.startswith(cls.__name__) else f"{cls.__name__}: {line}"
    is_lightnings = type(error).__name__ == "MisconfigurationException"  # of what a user has set
    return in_a_line(chain[-1]) if everything or is_lightnings else None


def _is_behind(raised: Exception, error: Exception) -> bool:
    """Whether the parser's error is about that of a constructor."""
    # A union of types names the first type's error as its cause, and quotes the others.
    first = str(raised).partition("\n")[0].strip()
    return raised in _causes(error) or bool(first and first in str(error))


def in_a_line(error: BaseException) -> str:
    """An error in a line, with its type where the message alone says little.

    Args:
        error: Of anybody.
    """
    text = " ".join(str(error).split())
    text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."
    name = type(error).__name__
    return text if text and name in _TOLD_BARE else f"{name}: {text}".rstrip(": ")


def _causes(error: BaseException) -> list[BaseException]:
    reasons = [error]
    while (cause := reasons[-1].__cause__) is not None:
        reasons.append(cause)
    return reasons
