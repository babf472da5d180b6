"""The one shape of every error: where(argument=value), the rule, the way out."""

import math
from collections.abc import Iterable
from numbers import Integral

_MOST_SHOWN = 500  # characters of a value: the records of a data set in memory hide the rule


def argument_error(
    where: str, argument: str, value: object, rule: str, way_out: str = ""
) -> ValueError:
    """Build the error for a value the user gave us, so that every message reads alike.

    Args:
        where: Class or function the user called.
        argument: Name of the argument, as the user wrote it.
        value: What was received.
        rule: What must hold, without a full stop.
        way_out: What to do instead, without a full stop.
    """
    message = f"{where}({argument}={_shown(value)}): {rule}."
    return ValueError(f"{message} {way_out}." if way_out else message)


def check_least(where: str, least: int, **values: int) -> None:
    """Refuse the first of the arguments ``values`` that is below ``least``."""
    for argument, value in values.items():
        if value < least:
            raise argument_error(where, argument, value, f"must be at least {least}")


def check_whole(where: str, **values: object) -> None:
    """Refuse the first of the arguments ``values`` that is no integer, as 1e2 is none."""
    for argument, value in values.items():
        if not isinstance(value, Integral):
            raise argument_error(where, argument, value, "must be a whole number, an int")


def check_choice(where: str, argument: str, value: object, choices: Iterable[object]) -> None:
    """Refuse a value that is not among ``choices``, all of which the error names."""
    names = list(choices)
    if value not in names:
        rule = f"must be one of {', '.join(map(repr, names))}"
        raise argument_error(where, argument, value, rule)


def _shown(value: object) -> str:
    try:
        shown = repr(value)
    except (ValueError, RecursionError) as error:  # an integer of 5000 digits, lists 1000 deep
        return f"<{type(value).__name__}: {error}>"
    if len(shown) <= _MOST_SHOWN:
        return shown
    return f"{shown[:_MOST_SHOWN]}... ({len(shown):,} characters)"


def finite_number(value: object) -> float | None:
    """``value`` as a float; None if it is no number, or NaN, infinite or too large for a float."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:  # 10**400 is less than infinity all the same
        return None
    return number if math.isfinite(number) else None


def add_note(error: BaseException, note: str) -> None:
    """Say more of an error, under it; before Python 3.11, which has notes, in its message.

    Args:
        error: Of anybody.
        note: A sentence.
    """
    if hasattr(error, "add_note"):
        error.add_note(note)
    elif isinstance(error, OSError) and error.strerror:
        of = "" if error.filename is None else f": {error.filename!r}"  # it would come last
        error.strerror, error.filename = f"{error.strerror}{of}\n{note}", None
    elif isinstance(getattr(error, "msg", None), str):  # ImportError and SyntaxError show that
        error.msg = f"{error.msg}\n{note}"  # type: ignore[attr-defined]
    else:
        error.args = (f"{error.args[0] if error.args else ''}\n{note}", *error.args[1:])
