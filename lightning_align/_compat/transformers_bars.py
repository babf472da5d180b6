"""Bars that transformers draws while a model is loaded or written, none of them by an argument."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers.utils import logging


def _none(factory: Callable[..., Any], given: tuple[Any, ...], options: dict[str, Any]) -> Any:  # noqa: ARG001
    bar: Any = logging.EmptyTqdm
    return bar(*given, **options)


@contextmanager
def without_bars() -> Iterator[None]:
    """Draw no bar of transformers' own; downloads, which may take minutes, keep theirs.

    ``logging.disable_progress_bar`` would take those, too.
    """
    before = logging._tqdm_hook
    logging.set_tqdm_hook(_none)
    try:
        yield
    finally:
        logging.set_tqdm_hook(before)
