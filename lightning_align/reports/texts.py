"""Text goes where the run's scalars go: rows of it to every logger that takes tables or text.

As with pictures (pictures.py), each logger has its own word for it. A logger takes rows if it has
W&B's ``log_table(key, columns, data, step)``, or if its ``experiment`` has TensorBoard's
``add_text(tag, text, step)``. Where none does, each row becomes a JSON line of a file in
``trainer.default_root_dir``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities import rank_zero_warn

from lightning_align._compat import lightning_logged

Row = dict[str, Any]  # column -> plain value; every row of a call has the same columns


def log_rows(trainer: pl.Trainer, key: str, rows: list[Row], *, filename: str) -> list[str]:
    """Send rows to every logger that takes them; returns where they went, in words.

    Text is never worth a run, so a file that cannot be written is a warning.

    Args:
        trainer: Its loggers, global step and ``default_root_dir`` are used.
        key: Name of the table in the loggers, for instance ``"samples"``.
        rows: What to log, at least one row.
        filename: JSON lines file under ``trainer.default_root_dir`` that rows are appended to if
            no logger takes them.
    """
    if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
        return []
    step = lightning_logged.line_number(trainer)
    places = send_rows(trainer, key, rows)
    if not places:
        path = os.path.join(trainer.default_root_dir, filename)
        try:
            _append(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
            places.append(path)
        except OSError as error:
            rank_zero_warn(f"{key!r} of step {step} was not written: {error}")
    return places


def send_rows(trainer: pl.Trainer, key: str, rows: list[Row]) -> list[str]:
    """Send rows to every logger that takes them; returns where they went, in words."""
    step, columns = lightning_logged.line_number(trainer), list(rows[0])
    data = [[row[name] for name in columns] for row in rows]
    text = "\n\n".join(map(_markdown, rows))
    ways: dict[str, Callable[[Any], object]] = {
        "log_table": lambda log: log(key=key, columns=columns, data=data, step=step),
        "add_text": lambda add: add(key, text, step),
    }
    return send(trainer, key, ways)


def send(trainer: pl.Trainer, key: str, ways: Mapping[str, Callable[[Any], object]]) -> list[str]:
    """Hand every logger to the first of ``ways`` that it knows; returns where it went, in words.

    Args:
        trainer: Its loggers are used.
        key: Name in the loggers.
        ways: Name of a method, ``log_...`` of a logger or else of its ``experiment`` -> what to do
            with it.
    """
    places = []
    for logger in trainer.loggers:
        if isinstance(logger, DummyLogger):  # fast_dev_run: it takes every name, keeps nothing
            continue
        for name, way in ways.items():
            owner = logger if name.startswith("log_") else getattr(logger, "experiment", None)
            if callable(method := getattr(owner, name, None)):
                way(method)
                places.append(f"{type(logger).__name__} as {key!r}")
                break
    return places


def _markdown(row: Row) -> str:
    # Indented, so that what looks like markup in a text stays as it is.
    parts = []
    for name, value in row.items():
        indented = "\n".join(f"    {line}" for line in str(value).split("\n"))
        parts.append(f"{name}\n\n{indented}")
    return "\n\n".join(parts)


def _append(path: str, text: str) -> None:
    filesystem, inner_path = url_to_fs(path)
    filesystem.makedirs(os.path.dirname(inner_path), exist_ok=True)
    if isinstance(filesystem, LocalFileSystem):
        with filesystem.open(inner_path, "ab") as file:
            file.write(text.encode())
        return
    # Object stores cannot append.
    before = filesystem.cat_file(inner_path) if filesystem.exists(inner_path) else b""
    filesystem.pipe_file(inner_path, before + text.encode())
