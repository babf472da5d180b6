"""Schedules as CSV files in torch's form: a row for each rank, a cell for each action, ``2F0``."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import numpy as np

from lightning_align._errors import argument_error
from lightning_align.pipelining.actions import KINDS, Action, Schedule, find_fault


def read_schedule_csv(
    path: str | Path, *, where: str = "read_schedule_csv", argument: str = "path"
) -> Schedule:
    """Read what torch's ``_load_csv`` reads, and check that it is a complete schedule.

    Empty cells are skipped. An overlapped pair, ``(0F3;1B0)OVERLAP_F_B``, is read as its two
    actions. That ranks do not wait for each other in a circle, ``simulate`` finds out.

    Args:
        path: File to read.
        where: Class or function that the user called, for errors.
        argument: Argument of ``where`` that has the path, for errors.

    Raises:
        ValueError: If the file cannot be read, or it is not a complete schedule; the message names
            rank, row and action.
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            lines = list(csv.reader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        rule = f"cannot be read ({error})"
        raise argument_error(where, argument, str(path), rule) from error
    while lines and not any(lines[-1]):  # empty lines at the end are no ranks
        lines.pop()
    rows = []
    for rank, cells in enumerate(lines):
        actions: list[Action] = []
        for column, cell in enumerate(cells):
            for part in _parts(cell):
                action = Action.parse(part)
                if action is None:
                    rule = f"rank {rank} (row {rank + 1}), cell {column + 1} is {cell!r}"
                    way_out = "Write stage, one of F, B, I and W, and microbatch, such as 2F0"
                    raise argument_error(where, argument, str(path), rule, way_out)
                actions.append(action)
        triples = [(stage, KINDS.index(kind), mb) for stage, kind, mb in actions]
        rows.append(np.array(triples, dtype=np.int64).reshape(-1, 3))
    if not any(map(len, rows)):
        raise argument_error(where, argument, str(path), "has no actions")
    num_stages, num_microbatches = (
        int(max(rows_N3[:, column].max(initial=0) for rows_N3 in rows)) + 1 for column in (0, 2)
    )
    if fault := find_fault(rows, num_stages, num_microbatches):
        raise argument_error(where, argument, str(path), fault)
    return Schedule(os.path.basename(path), num_stages, num_microbatches, rows)


def _parts(cell: str) -> list[str]:
    cell = cell.strip()
    if cell.startswith("(") and cell.endswith(")OVERLAP_F_B"):
        cell = cell.removeprefix("(").removesuffix(")OVERLAP_F_B")
    return [part.strip() for part in cell.split(";") if part.strip()]


def write_schedule_csv(schedule: Schedule, path: str | Path) -> None:
    """Write a schedule in the form that torch's ``_load_csv`` reads."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerows(map(str, schedule.actions(rank)) for rank in range(schedule.num_ranks))
