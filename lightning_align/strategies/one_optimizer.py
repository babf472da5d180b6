"""A strategy that steps the optimizer itself takes a module with one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lightning_align._errors import argument_error


@contextmanager
def one_optimizer(where: str) -> Iterator[None]:
    """Around the making of optimizers; Lightning's way out of several is to optimize manually.

    Args:
        where: Class of the strategy, for the message of an error.

    Raises:
        ValueError: If there are several.
        RuntimeError: If Lightning refuses them for another reason.
    """
    try:
        yield
    except RuntimeError as error:
        if "multiple optimizers" not in str(error):
            raise
        rule = "the module must have one optimizer, and has several"
        way_out = "Put all parameters into groups of one"
        raise argument_error(where, "optimizers", "...", rule, way_out) from error
