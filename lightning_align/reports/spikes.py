"""Reports of incidents: JSON and a picture each, an overview, and all of it through the loggers.

A report is never worth a run: whatever cannot be written or sent is warned of once.
"""

from __future__ import annotations

import math
import os
from array import array
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from fsspec.core import url_to_fs
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities import rank_zero_warn

from lightning_align._compat import lightning_logged
from lightning_align.reports.pictures import draw, send_image, write_file
from lightning_align.reports.spike_pictures import draw_incident, draw_overview
from lightning_align.reports.texts import Row, send, send_rows
from lightning_align.spike_incidents import Incident

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KEY = "spikes"  # of everything in the loggers


class SpikeReport:
    """Writes what is known of incidents, as soon as it is.

    Call its methods on every rank: only rank zero writes.

    Args:
        folder: Where JSON and pictures go, local or at any fsspec URL; relative to the Trainer's
            ``default_root_dir``. None sends them to the loggers only.

    Attributes:
        incidents: All of the run.
        is_read: Whether reports go anywhere.
    """

    def __init__(self, folder: str | None) -> None:
        self.folder = folder
        self.is_read = self._draws = False
        self.begin()

    def begin(self) -> None:
        """Begin the reports of a new run."""
        self.incidents: list[Incident] = []
        self._names: dict[int, str] = {}  # by their number
        self._curve = {name: array("d") for name in ("step", "loss", "grad_norm")}
        self._warned = False

    def follow(self, trainer: pl.Trainer) -> None:
        """Ask whether reports of a run go anywhere, before its first step."""
        loggers = [each for each in trainer.loggers if not isinstance(each, DummyLogger)]
        self.is_read = self.folder is not None or bool(loggers)
        self._draws = self.is_read and self._writes(trainer)

    def note(self, step: int, loss: float, grad_norm: float | None) -> None:
        """Note a step for the picture of the whole run, if there will be one."""
        if not self._draws:
            return
        values = (step, loss, math.nan if grad_norm is None else grad_norm)
        for curve, value in zip(self._curve.values(), values, strict=True):
            curve.append(value)

    def add(self, trainer: pl.Trainer, incident: Incident) -> None:
        """Report a new incident: files, picture, scalars, a table of all so far, an alert."""
        self.incidents.append(incident)
        if not self._writes(trainer):
            return
        self._try(self._write_files, trainer, incident)
        self._try(self._send_picture, trainer, f"{KEY}/incident", draw_incident, incident)
        self._try(self._send_texts, trainer, incident)

    def update(self, trainer: pl.Trainer, incident: Incident) -> None:
        """Write the files of an incident again, of which more is known."""
        if self._writes(trainer):
            self._try(self._write_files, trainer, incident)

    def end(self, trainer: pl.Trainer) -> None:
        """Draw the whole run, if it had an incident."""
        if not self.incidents or not self._writes(trainer):
            return
        arguments = (self._curve, self.incidents)
        self._try(self._send_picture, trainer, f"{KEY}/overview", draw_overview, *arguments)
        if self.folder is not None:
            path = os.path.join(self._folder(trainer), "overview.png")
            self._try(lambda: write_file(path, draw(draw_overview(*arguments))[0]))

    def _writes(self, trainer: pl.Trainer) -> bool:
        return trainer.is_global_zero and not trainer.fast_dev_run  # type: ignore[attr-defined]

    def _folder(self, trainer: pl.Trainer) -> str:
        folder = os.path.expanduser(self.folder or "")
        return folder if "://" in folder else os.path.join(trainer.default_root_dir, folder)

    def _write_files(self, trainer: pl.Trainer, incident: Incident) -> None:
        if self.folder is None:
            return
        path = os.path.join(self._folder(trainer), self._name(trainer, incident))
        write_file(f"{path}.json", incident.to_json().encode())
        write_file(f"{path}.png", draw(draw_incident(incident))[0])

    def _name(self, trainer: pl.Trainer, incident: Incident) -> str:
        """Name of an incident's files; after a rewind, a step may have its second."""
        number = next(i for i, each in enumerate(self.incidents) if each is incident)
        if number not in self._names:
            filesystem, inner = url_to_fs(self._folder(trainer))
            name, count = f"step_{incident.step:07d}", 1
            while filesystem.exists(f"{inner}/{name}.json"):
                count += 1
                name = f"step_{incident.step:07d}_{count}"
            self._names[number] = name
        return self._names[number]

    def _send_picture(
        self, trainer: pl.Trainer, key: str, make: Callable[..., Figure], *arguments: Any
    ) -> None:
        ways: dict[str, Callable[[Any], object]] = dict.fromkeys(
            ("log_image", "add_image"), lambda _: None
        )
        if send(trainer, key, ways):  # somebody takes pictures
            send_image(trainer, key, draw(make(*arguments))[1])

    def _send_texts(self, trainer: pl.Trainer, incident: Incident) -> None:
        values = {
            f"{KEY}/count": float(len(self.incidents)),
            f"{KEY}/loss": incident.loss,
            f"{KEY}/grad_norm": incident.grad_norm,
            f"{KEY}/loss_score": incident.loss_score,
            f"{KEY}/norm_score": incident.norm_score,
        }
        numbers = {name: value for name, value in values.items() if value is not None}
        for logger in trainer.loggers:
            logger.log_metrics(numbers, step=lightning_logged.line_number(trainer))
        send_rows(trainer, f"{KEY}/incidents", [_row(each) for each in self.incidents])
        title, text = f"Spike at step {incident.step}", describe(incident)
        send(trainer, KEY, {"alert": lambda alert: alert(title=title, text=text)})

    def _try(self, function: Callable[..., Any], *arguments: Any) -> None:
        try:
            function(*arguments)
        except Exception as error:  # loggers and filesystems raise whatever they like
            if not self._warned:
                rank_zero_warn(
                    f"SpikeGuard(report_dir={self.folder!r}): a report was not written, and"
                    f" training goes on: {type(error).__name__}: {error}. Only this first time is"
                    " warned of."
                )
            self._warned = True


def describe(incident: Incident) -> str:
    """An incident in a sentence or two."""
    norm = "" if incident.grad_norm is None else f", gradient norm {incident.grad_norm:.4g}"
    cause = incident.cause
    because = "" if cause is None else f" Cause: {cause.label}. {cause.text}"
    return (
        f"Step {incident.step}: loss {incident.loss:.4g}{norm}; {incident.reason};"
        f" {incident.action}.{because}"
    )


def _row(incident: Incident) -> Row:
    cause = incident.cause
    return {
        "step": incident.step,
        "epoch": incident.epoch,
        "position": incident.position,
        "loss": incident.loss,
        "grad_norm": incident.grad_norm,
        "reason": incident.reason,
        "action": incident.action,
        "cause": cause.label if cause is not None else "",
        "why": cause.text if cause is not None else "",
        "preview": "\n".join(text for batch in incident.batches for text in batch.preview),
    }
