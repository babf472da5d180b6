"""``lightning-align spikes``: incidents of a run as a table, skip lists, spikes in any metrics."""

from __future__ import annotations

import csv as tables
import inspect
import io
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import fsspec
from fsspec.core import url_to_fs

from lightning_align._errors import argument_error
from lightning_align.cli.commands import CommandParser
from lightning_align.cli.mistakes import did_you_mean
from lightning_align.data.skip_list import write_skip_list
from lightning_align.data.skipped import SkippedBatches
from lightning_align.spike_incidents import Incident
from lightning_align.stability import SpikeDetector

WIDEST = 60  # characters of a cell


def spikes(
    folder: str | Path | None = None,
    *,
    skip_list: str | Path | None = None,
    csv: str | Path | None = None,
    step_column: str = "step",
    loss_column: str = "train_loss",
    grad_norm_column: str | None = "grad_norm",
    window: int = 64,
    warmup: int | None = None,
) -> str:
    """Read the reports of a guarded run, or find the spikes in a metrics file; returns a table.

    Args:
        folder: Folder of the reports: report_dir of SpikeGuard, local or at any fsspec URL.
        skip_list: File to write the batches to that the run left out, and those whose data was the
            cause; SpikeGuard(skip_list=...) leaves them out of a new run.
        csv: Metrics of any framework, one row a step, to find spikes in instead of reading reports.
        step_column: Column of the CSV with the step; rows are counted if there is none.
        loss_column: Column of the CSV with the loss; rows without it are passed over.
        grad_norm_column: Column of the CSV with the gradient norm; the loss alone is judged if
            there is none.
        window: Rows of the CSV that a verdict is made from.
        warmup: Rows of the CSV before the first verdict; as many as the window if not given.

    Raises:
        ValueError: If there is no such folder, file or column, or an argument is of the other mode.
    """
    if (folder is None) == (csv is None):
        rule = "give the folder of a run's reports, or a metrics file with --csv"
        raise argument_error("spikes", "folder", folder, rule)
    if csv is not None:
        if skip_list is not None:
            rule = "a metrics file knows no batches"
            way_out = "Give the folder of a run's reports"
            raise argument_error("spikes", "skip_list", str(skip_list), rule, way_out)
        columns = {"step": step_column, "loss": loss_column, "grad_norm": grad_norm_column}
        try:
            detector = SpikeDetector(window=window, warmup=warmup)
        except ValueError as error:  # of an option of ours
            raise ValueError(str(error).replace("SpikeDetector(", "spikes(", 1)) from error
        return _of_metrics(str(csv), columns, detector)
    given = {
        "step_column": step_column,
        "loss_column": loss_column,
        "grad_norm_column": grad_norm_column,
        "window": window,
        "warmup": warmup,
    }
    _refuse_options_of_metrics(given)
    incidents = read_incidents(str(folder))
    lines = _table(incidents)
    if skip_list is not None:
        lines.append(_write_skip_list(str(skip_list), incidents))
    return "\n".join(lines)


def _refuse_options_of_metrics(given: Mapping[str, Any]) -> None:
    usual = inspect.signature(spikes).parameters
    for name, value in given.items():
        if value != usual[name].default:
            rule = "is for the rows of a metrics file, and reports were judged in their run"
            raise argument_error("spikes", name, value, rule, "Leave it out, or give --csv")


def read_incidents(folder: str) -> list[Incident]:
    """The incidents that a run has reported, in the order of their steps.

    Raises:
        ValueError: If there is no such folder, or a report cannot be read.
    """
    try:
        filesystem, inner = url_to_fs(os.path.expanduser(folder))
        is_there = filesystem.isdir(inner)
        paths = sorted(filesystem.glob(f"{inner}/step_*.json")) if is_there else []
    except (OSError, ValueError, ImportError) as error:  # an unknown protocol, no extra for it
        raise argument_error("spikes", "folder", folder, f"cannot be read: {error}") from error
    if not is_there:
        way_out = "It is report_dir of SpikeGuard, below the Trainer's default_root_dir"
        raise argument_error("spikes", "folder", folder, "there is no such folder", way_out)
    read = [(path, filesystem.cat_file(path).decode()) for path in paths]
    names = {"where": "spikes", "argument": "folder"}
    return [Incident.from_json(text, path, **names) for path, text in read]


def batches_to_skip(incidents: Sequence[Incident]) -> SkippedBatches:
    """What was left out, and the windows whose data was the cause of an alarm."""
    ranges = [tuple(pair) for incident in incidents for pair in incident.skipped]
    for incident in incidents:
        if not incident.skipped and incident.cause is not None and incident.cause.kind == "data":
            ranges += [(each.position, each.position + 1) for each in incident.batches]
    return SkippedBatches(ranges)


def _table(incidents: Sequence[Incident]) -> list[str]:
    if not incidents:
        return ["No incidents."]
    rows = [["step", "epoch", "batches", "loss", "grad norm", "alarm", "action", "cause"]]
    for incident in incidents:
        positions = [each.position for each in incident.batches] or [incident.position]
        last = "" if len(set(positions)) == 1 else f"-{max(positions)}"
        cause = incident.cause.label if incident.cause is not None else ""
        rows.append(
            [
                str(incident.step),
                str(incident.epoch),
                f"{min(positions)}{last}",
                f"{incident.loss:.4g}",
                "" if incident.grad_norm is None else f"{incident.grad_norm:.4g}",
                incident.reason,
                incident.action,
                cause,
            ]
        )
    why = [
        f"step {each.step}: {each.cause.text}"
        for each in incidents
        if each.cause is not None and each.cause.text
    ]
    return [*_columns(rows), "", *why]


def _columns(rows: list[list[str]]) -> list[str]:
    rows = [[cell[:WIDEST] for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)) for row in rows)
    return [line.rstrip() for line in lines]


def _write_skip_list(path: str, incidents: Sequence[Incident]) -> str:
    def error(rule: str, way_out: str = "") -> ValueError:
        return argument_error("spikes", "skip_list", path, rule, way_out)

    streams = [incident.stream for incident in incidents if incident.stream]
    if not streams:
        way_out = "Guard a run with ExactResume(), by which its batches have numbers"
        raise error("no report says which stream of batches it is of", way_out)
    if any(stream != streams[0] for stream in streams):
        rule = "the reports are of runs with different data or seeds, whose batches differ"
        raise error(rule, "Give the folder of one run")
    skipped = batches_to_skip(incidents)
    try:
        write_skip_list(os.path.expanduser(path), skipped, streams[0])
    except (OSError, ValueError, ImportError) as reason:
        raise error(f"cannot be written: {reason}") from reason
    return f"wrote {path}: {len(skipped)} batches to leave out"


def _of_metrics(path: str, columns: dict[str, str | None], detector: SpikeDetector) -> str:
    rows = [["step", "loss", "expected", "grad norm", "expected", "alarm"]]
    count, has_norm = 0, False
    for step, loss, norm in _read_metrics(path, columns):
        count, has_norm = count + 1, has_norm or norm is not None
        verdict = detector.update(step, loss, norm)
        if verdict.is_spike:
            values = (loss, verdict.loss_expected, norm, verdict.norm_expected)
            shown = ["" if value is None else f"{value:.4g}" for value in values]
            rows.append([str(step), *shown, verdict.reason])
    found = len(rows) - 1
    summary = f"{found} alarm{'s' if found != 1 else ''} in {count:,} rows of {path}"
    if not has_norm:
        summary += ", judged by the loss alone: there is no gradient norm"
        summary += f" in column {columns['grad_norm']}" if columns["grad_norm"] else ""
    return "\n".join([*(_columns(rows) if found else []), summary])


def _read_metrics(
    path: str, columns: dict[str, str | None]
) -> Iterator[tuple[int, float, float | None]]:
    """(step, loss, gradient norm) of each row that has a loss."""
    try:
        with fsspec.open(os.path.expanduser(path), "rt", newline="", compression="infer") as file:
            text = file.read()
    except (OSError, ValueError, ImportError) as error:
        raise argument_error("spikes", "csv", path, f"cannot be read: {error}") from error
    delimiter = "\t" if text.partition("\n")[0].count("\t") else ","
    reader = tables.DictReader(io.StringIO(text), delimiter=delimiter)
    names = list(reader.fieldnames or [])
    loss_column = str(columns["loss"])
    if loss_column not in names:
        hint = did_you_mean(loss_column, names).strip().rstrip("?")
        rule = f"the file has no such column; it has {', '.join(names) or 'none'}"
        raise argument_error("spikes", "loss_column", loss_column, rule, hint and f"{hint}?")
    for number, row in enumerate(reader):
        loss = _number(path, loss_column, row)
        if loss is None:
            continue  # of a validation, for instance
        step = _number(path, columns["step"], row)
        counted = number if step is None or not math.isfinite(step) else int(step)
        yield counted, loss, _number(path, columns["grad_norm"], row)


def _number(path: str, column: str | None, row: dict[str, Any]) -> float | None:
    """A cell as a number, None where there is none."""
    cell = row.get(column) if column is not None else None
    if cell is None or not cell.strip():
        return None
    try:
        return float(cell)
    except ValueError as error:
        rule = f"has {cell!r} in column {column}, which is no number"
        raise argument_error("spikes", "csv", path, rule) from error


def parser() -> CommandParser:
    """Options of ``lightning-align spikes``."""
    about = "Print the incidents of a run, or the spikes in a metrics CSV of any framework."
    parser = CommandParser("lightning-align spikes", about)
    help_folder = "Folder of the reports: report_dir of SpikeGuard, local or at any fsspec URL."
    parser.add_argument("folder", nargs="?", type=str, help=help_folder)
    parser.add_function_arguments(spikes, as_group=False, skip={"folder"})
    return parser


def main(arguments: Sequence[str]) -> None:
    """Run ``lightning-align spikes``."""
    print(spikes(**parser().parse_args(list(arguments)).as_dict()))  # noqa: T201
