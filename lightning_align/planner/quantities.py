"""Numbers with units as users write them: 80GB, 3.35TB/s, 989 TFLOPS, 30min; bare, in SI."""

from __future__ import annotations

import math
import re

from lightning_align._errors import argument_error, finite_number

BYTES, BYTES_A_SECOND, FLOPS, SECONDS = "bytes", "bytes a second", "FLOP/s", "seconds"
_PREFIXES = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "p": 1e15}
_BINARY = {f"{prefix}i": 1024.0**power for power, prefix in enumerate("kmgtp", start=1)}
_NAMES = {
    BYTES: ("b", "byte", "bytes"),
    BYTES_A_SECOND: ("b/s", "bps", "byte/s", "bytes/s"),
    FLOPS: ("flops", "flop/s", "flops/s"),
}
_TIMES = {"ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0, "y": 365.25 * 86400}
_EXAMPLES = {
    BYTES: "'80GB'",
    BYTES_A_SECOND: "'3.35TB/s'",
    FLOPS: "'989TFLOPS'",
    SECONDS: "'30min' (ms, s, min, h, d, y)",
}


def quantity(
    where: str, argument: str, value: float | str, unit: str, *, zero: bool = False
) -> float:
    """A number in a unit of SI, from a number or a text with a unit.

    Args:
        where: What the user called.
        argument: Its argument.
        value: A number, or a text such as ``"80GB"`` or ``"24GiB"``.
        unit: Bytes, bytes a second, FLOP/s or seconds.
        zero: Whether there may be none.

    Raises:
        ValueError: If it is no such number, or not a positive, finite one.
    """
    number = _parsed(value, unit) if isinstance(value, str) else finite_number(value)
    if number is None or not math.isfinite(number):
        rule = f"must be a finite number of {unit}, or a text such as {_EXAMPLES[unit]}"
        raise argument_error(where, argument, value, rule)
    if number < 0 or not (number or zero):
        rule = f"must be {'at least 0' if zero else 'positive'}, in {unit}"
        raise argument_error(where, argument, value, rule)
    return number


def _parsed(text: str, unit: str) -> float | None:
    found = re.fullmatch(r"\s*([\d.]+(?:[eE][+-]?\d+)?)\s*([A-Za-z/]*)\s*", text)
    if found is None:
        return None
    try:
        number = float(found[1])
    except ValueError:
        return None
    written = found[2].lower()
    if not written:
        return number
    if unit == SECONDS:
        return number * _TIMES[written] if written in _TIMES else None
    for prefix, factor in (_PREFIXES | _BINARY).items():
        if written in {f"{prefix}{name}" for name in _NAMES[unit]}:
            return number * factor
    return None


def shown(number: float, unit: str = "B") -> str:
    """A number with three digits and a prefix of SI: 1.6e10 is 16 GB."""
    for prefix, factor in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= 0.9995 * factor:
            return f"{number / factor:.3g} {prefix}{unit}"
    return f"{number:.3g} {unit}".rstrip()


def shown_time(seconds: float) -> str:
    """A time with three digits and the largest unit of which there is one: 5400 s are 1.5 h."""
    for unit in ("y", "d", "h", "min", "s"):
        if seconds >= 0.9995 * _TIMES[unit]:
            return f"{seconds / _TIMES[unit]:.3g} {unit}"
    return f"{seconds / _TIMES['ms']:.3g} ms"
