"""Draw a run's logged metrics when it ends: the picture that one looks at first."""

import math
import posixpath
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import override

from lightning_align._declared import declared
from lightning_align._errors import argument_error
from lightning_align.figure import new_figure
from lightning_align.reports.pictures import log_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe & Ito's palette (https://jfly.uni-koeln.de/color): told apart with any colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
NOISY_POINTS = 60  # a noisy curve with more points also gets its running mean
SPARSE_POINTS = 25  # a curve with fewer shows each of them

Curve = dict[str, list[Any]]  # {"steps": [int, ...], "values": [float, ...]}
Panels = list[tuple[str, list[str]]]  # (title, metric names), in drawing order


@declared
class MetricPlot(Callback):
    """Draw logged metrics over optimizer steps into one PNG at the end of ``fit``.

    Works with any LightningModule that calls ``self.log``; the picture goes to every logger that
    takes images and, beside an earlier one, to the folder of the run: that of its first logger with
    one, else ``trainer.default_root_dir``. Training is not changed. Step metrics are read every
    ``trainer.log_every_n_steps`` optimizer steps, when Lightning itself copies them for its loggers
    (every step of a run that has less than two such), validation and epoch metrics whenever they
    are new. The curves are part of the checkpoint, so a resumed run draws the whole run.

    Args:
        metrics: Names as logged; names that differ only in train, val or test share a panel, and a
            list of names is a panel of its own.
        filename: PNG to write, relative to the folder of the run.
        units: Unit of a panel or metric for its axis, for instance ``{"loss": "nats per token"}``.

    Raises:
        ValueError: If ``metrics`` is no list of names, ``filename`` is no PNG, or ``units`` has a
            name that is not drawn.

    Example:
        >>> callback = MetricPlot(metrics=("train_loss", "val_loss", "lr"))

    Note: a name logged both per step and per epoch means the step value; ask for ``<name>_epoch``
    to see the mean. What a module logs in its own ``on_train_batch_end`` appears one step late.
    """

    def __init__(
        self,
        metrics: Sequence[str | list[str]] = ("train_loss", "val_loss"),
        filename: str = "curves.png",
        units: dict[str, str] | None = None,
    ) -> None:
        if isinstance(metrics, str) or not metrics or not all(metrics):
            rule = "must be a list of metric names, not empty"
            raise argument_error("MetricPlot", "metrics", metrics, rule)
        if not filename.endswith(".png"):
            raise argument_error("MetricPlot", "filename", filename, "must end in '.png'")
        self.panels = arrange(metrics)
        self.names = [name for _, names in self.panels for name in names]
        self.units = units or {}
        strangers = self.units.keys() - {title for title, _ in self.panels} - set(self.names)
        if strangers:
            rule = "must be names of metrics or panels"
            way_out = f"Panels are {[title for title, _ in self.panels]}"
            raise argument_error("MetricPlot", "units", sorted(strangers), rule, way_out)
        self.filename = filename
        self._curves: dict[str, Curve] = {}
        self._first: dict[str, Curve] = {}  # every step, for a run that is over before it is sparse
        self._recorded: dict[str, Tensor] = {}  # the tensors behind each curve's last point
        self._step_values: dict[str, Tensor] = {}  # what was logged when the last batch ended
        self._step_before_batch = 0

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            new_figure(1, 1)  # a missing matplotlib is reported before the run, not after it
            if trainer.global_step == 0:  # a new run; a resumed one loads its curves after setup
                self._curves, self._first = {}, {}

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._step_before_batch = trainer.global_step

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        stepped = trainer.global_step != self._step_before_batch  # not so inside an accumulation
        interval = trainer.log_every_n_steps  # type: ignore[attr-defined]
        values = self._logged(trainer)
        if stepped and interval and trainer.global_step % interval == 0:
            self._record(trainer, values)
        elif stepped and self._is_short(trainer):
            seen = (self._step_values, self._recorded)  # a validation's values stay, too
            new = {
                name: x
                for name, x in values.items()
                if not any(_is_same(x, held.get(name)) for held in seen)
            }
            self._note_first(trainer.global_step, new)
        if self._first and not self._is_short(trainer):
            self._first = {}
        self._step_values = values

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._record_new(trainer)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._record_new(trainer)  # before the checkpoint of this epoch is written

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._record_new(trainer)  # what the module logged in on_train_epoch_end, after ours

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._record_new(trainer)
        if self._is_short(trainer):
            self._curves = joined(self._first, self._curves)
        self._recorded, self._step_values, self._first = {}, {}, {}
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        missing = [name for name in self.names if name not in self._curves]
        if missing:
            logged = ", ".join(sorted(trainer.callback_metrics)) or "nothing"
            rank_zero_warn(
                f"MetricPlot(metrics={missing}): no values, so not drawn. Logged were: {logged}."
            )
        if len(missing) < len(self.names):
            figure = draw_curves(self.panels, self._curves, self.units)
            key = PurePosixPath(self.filename).stem
            for place in log_figure(trainer, key, figure, filename=self.filename):
                rank_zero_info(f"Curves drawn: {place}")

    @override
    def state_dict(self) -> dict[str, Any]:
        first = {"first": _plain(self._first)} if self._first else {}
        return {"curves": self._curves, **first}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._curves = _plain(state_dict["curves"])
        self._first = _plain(state_dict.get("first", {}))

    def _is_short(self, trainer: Trainer) -> bool:
        """Whether step metrics would have a point or none, if the run ended here."""
        return bool(trainer.global_step < 2 * trainer.log_every_n_steps)  # type: ignore[attr-defined]

    def _note_first(self, step: int, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            curve = self._first.setdefault(name, {"steps": [], "values": []})
            while curve["steps"] and curve["steps"][-1] >= step:  # a run that was rewound
                curve["steps"].pop()
                curve["values"].pop()
            curve["steps"].append(step)
            curve["values"].append(value.detach())  # read at the end, so that no step waits for it

    def _logged(self, trainer: Trainer) -> dict[str, Tensor]:
        # Read on every rank: an epoch mean with sync_dist is a collective operation.
        logged = trainer.callback_metrics
        values = {name: logged.get(f"{name}_step", logged.get(name)) for name in self.names}
        return {name: value for name, value in values.items() if value is not None}

    def _record_new(self, trainer: Trainer) -> None:
        # Step values stay in callback_metrics after their batch. Taking them here would sample the
        # last batch of every epoch, often a short and noisy one, besides every n-th step.
        values = self._logged(trainer).items()
        new = {name: x for name, x in values if not _is_same(x, self._step_values.get(name))}
        self._record(trainer, new)

    def _record(self, trainer: Trainer, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            if _is_same(value, self._recorded.get(name)):
                continue
            self._recorded[name] = value
            curve = self._curves.setdefault(name, {"steps": [], "values": []})
            # A run that was rewound has its steps again: the last time counts.
            while curve["steps"] and curve["steps"][-1] >= trainer.global_step:
                curve["steps"].pop()
                curve["values"].pop()
            curve["steps"].append(trainer.global_step)
            curve["values"].append(value.item())


def _is_same(value: Tensor, held: Tensor | None) -> bool:
    """Whether a metric was not logged again, found without waiting for the device.

    callback_metrics keeps old values and hands out views of them. While we hold one, its memory
    cannot be reused, so the same address means the same value.
    """
    return held is not None and held.data_ptr() == value.data_ptr()


def _plain(curves: Mapping[str, Curve]) -> dict[str, Curve]:
    """Copies of curves, with numbers in the place of tensors."""
    return {
        name: {"steps": list(curve["steps"]), "values": [float(x) for x in curve["values"]]}
        for name, curve in curves.items()
    }


def joined(first: Mapping[str, Curve], later: Mapping[str, Curve]) -> dict[str, Curve]:
    """Curves with the points of two; where both have one of a step, that of the second."""
    curves: dict[str, Curve] = {}
    for name in {**first, **later}:
        points: dict[int, Any] = {}
        for part in (_plain(first), later):
            if name in part:
                points |= zip(part[name]["steps"], part[name]["values"], strict=True)
        steps = sorted(points)
        curves[name] = {"steps": steps, "values": [points[step] for step in steps]}
    return curves


def arrange(metrics: Sequence[str | list[str]]) -> Panels:
    """Group metric names into panels: by what they measure, or as the caller listed them."""
    panels: Panels = []
    shared: dict[str, list[str]] = {}
    for entry in metrics:
        if not isinstance(entry, str):
            measured = list(dict.fromkeys(_without_stage(name) for name in entry))
            panels.append((posixpath.commonpath(measured) or ", ".join(measured), list(entry)))
            continue
        title = _without_stage(entry)
        if title not in shared:
            shared[title] = []
            panels.append((title, shared[title]))
        shared[title].append(entry)
    return panels


def draw_curves(panels: Panels, curves: Mapping[str, Curve], units: Mapping[str, str]) -> "Figure":
    """One panel per group, steps along x; panels and names without a curve are left out."""
    drawn = [(title, [name for name in names if name in curves]) for title, names in panels]
    drawn = [(title, names) for title, names in drawn if names]
    columns = len(drawn) if len(drawn) <= 3 else math.ceil(math.sqrt(len(drawn)))
    rows = math.ceil(len(drawn) / columns)
    figure = new_figure(max(6.0, 4.4 * columns), 3.3 * rows)
    figure.set_layout_engine("constrained", wspace=0.06, hspace=0.08, w_pad=0.1, h_pad=0.1)
    for i, (title, names) in enumerate(drawn):
        axes = figure.add_subplot(rows, columns, i + 1)
        for name, colour in zip(names, COLOURS * len(names), strict=False):
            _draw_curve(axes, name, curves[name], colour)
        unit = units.get(title, units.get(names[0]))
        axes.set_ylabel(f"{title} ({unit})" if unit else title)
        axes.set_xlabel("optimizer steps")
        _finish_axes(axes)
    return figure


def _draw_curve(axes: "Axes", name: str, curve: Curve, colour: str) -> None:
    steps, values = np.array(curve["steps"]), np.array(curve["values"])
    finite = np.isfinite(values)
    if not is_noisy(values[finite]):
        marker = "o" if len(steps) <= SPARSE_POINTS else None
        axes.plot(steps, values, color=colour, linewidth=1.6, marker=marker, ms=3.5, label=name)
        return
    axes.plot(steps, values, color=colour, linewidth=0.9, alpha=0.35)
    window = int(finite.sum()) // 15
    means = np.convolve(values[finite], np.full(window, 1 / window), mode="valid")
    middles = np.convolve(steps[finite], np.full(window, 1 / window), mode="valid")
    label = f"{name} (mean of {window} points)"
    axes.plot(middles, means, color=colour, linewidth=1.8, label=label)


def is_noisy(values: NDArray[np.float64]) -> bool:
    """Whether a running mean helps: many points, and more than a third of them turn back.

    Of pure noise two thirds are turning points (turning point test), of a learning rate one.
    """
    slopes = np.diff(values)
    turns = int((slopes[1:] * slopes[:-1] < 0).sum())
    return len(values) > NOISY_POINTS and turns > len(values) / 3


def _finish_axes(axes: "Axes") -> None:
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    axes.margins(x=0.02)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("0.6")
    axes.tick_params(color="0.6", labelcolor="0.25", labelsize="small")
    axes.ticklabel_format(axis="y", scilimits=(-2, 5), useMathText=True)
    axes.yaxis.get_offset_text().set(fontsize="small", color="0.25")
    if len(axes.lines) > 1:
        axes.legend(frameon=False, fontsize="small")


def _without_stage(name: str) -> str:
    name = re.sub(r"^(train|training|val|valid|validation|test|eval)[_/]", "", name)
    return re.sub(r"_(step|epoch)$", "", name)
