"""Pictures of spikes: one incident with its layers, and a whole run with all of them."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning_align.figure import new_figure
from lightning_align.spike_incidents import Incident

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette (https://jfly.uni-koeln.de/color): told apart with any colour vision.
CURVE, LIMIT, ALARM, LAYER = "#0072B2", "#999999", "#D55E00", "#56B4E9"
ACTIONS = {
    "log": "#999999",
    "clip": "#E69F00",
    "skip": "#009E73",
    "rewind": "#CC79A7",
    "stop": "#D55E00",
}
MOST_LAYERS = 40  # that have a bar each


def draw_incident(incident: Incident) -> Figure:
    """Loss and gradient norm up to an incident, their limits, and how far each layer was off.

    Args:
        incident: With whatever is known of it.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    layers = [each for each in incident.layers if each.score is not None]
    figure = new_figure(11, max(3.6, 1.6 + 0.18 * min(len(layers), MOST_LAYERS)))
    axes: Any = figure.subplots(1, 3 if layers else 2, squeeze=False)[0]
    steps = incident.history.get("step", [incident.step])
    losses = incident.history.get("loss", [incident.loss])
    _curve(axes[0], "loss", steps, losses, incident.loss_limit)
    norms = incident.history.get("grad_norm", [])
    _curve(axes[1], "gradient norm", steps[: len(norms)], norms, incident.norm_limit)
    if layers:
        shown = sorted(layers, key=lambda each: -_finite(each.score))[:MOST_LAYERS]
        names = [each.name for each in layers if each in shown]
        scores = [_finite(each.score) for each in layers if each in shown]
        colours = [ALARM if name in incident.first_layers else LAYER for name in names]
        axes[2].barh(range(len(names)), scores, color=colours)
        axes[2].set_yticks(range(len(names)), names, fontsize="x-small")
        axes[2].invert_yaxis()
        axes[2].set_xlabel("gradient norm over its own history\n(robust standard deviations)")
        _finish(axes[2])
    title = f"Step {incident.step}, batch {incident.position}: {incident.action}"
    if incident.cause is not None:
        title = f"{title}; {incident.cause.label}"
        figure.supxlabel("\n".join(textwrap.wrap(incident.cause.text, 130)), fontsize="small")
    figure.suptitle(title)
    return figure


def draw_overview(curve: Mapping[str, Sequence[float]], incidents: Sequence[Incident]) -> Figure:
    """A whole run: loss and gradient norm, with what was done at each incident.

    Args:
        curve: ``{"step": ..., "loss": ..., "grad_norm": ...}``, of all steps.
        incidents: Of the run, in their order.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    figure = new_figure(11, 5)
    axes: Any = figure.subplots(2, 1, sharex=True)
    for each, name, label in zip(
        axes, ("loss", "grad_norm"), ("loss", "gradient norm"), strict=True
    ):
        steps, values = list(curve.get("step", [])), list(curve.get(name, []))
        each.plot(steps, [_or_nan(v) for v in values], color=CURVE, linewidth=0.9)
        _logarithmic(each, values)
        each.set_ylabel(label)
        _finish(each)
        for action, colour in ACTIONS.items():
            at = [incident.step for incident in incidents if incident.action == action]
            for number, step in enumerate(at):
                label_once = action if number == 0 and name == "loss" else None
                look: Any = {"color": colour, "linewidth": 1.2, "alpha": 0.7, "zorder": 1}
                each.axvline(step, label=label_once, **look)
    _write_causes(axes[0], incidents, max(curve.get("step", [0]), default=0))
    axes[1].set_xlabel("optimizer steps")
    if incidents:
        figure.legend(loc="outside upper right", ncols=len(ACTIONS), frameon=False)
    return figure


def _write_causes(axes: Axes, incidents: Sequence[Incident], last_step: float) -> None:
    """The causes beside their lines, where there is room for a word."""
    free = -math.inf
    for incident in sorted(incidents, key=lambda each: each.step):
        if incident.cause is not None and incident.step >= free:
            where: Any = {"transform": axes.get_xaxis_transform(), "rotation": 90, "va": "top"}
            look: Any = {"fontsize": "x-small", "color": "0.25"}
            axes.text(incident.step, 0.98, f" {incident.cause.kind}", **where, **look)
            free = incident.step + 0.02 * last_step


def _curve(
    axes: Axes, name: str, steps: Sequence[float], values: Sequence[float], limit: float | None
) -> None:
    axes.plot(steps, [_or_nan(value) for value in values], color=CURVE, linewidth=1.2)
    if values and math.isfinite(values[-1]):
        axes.plot(steps[-1:], values[-1:], "o", color=ALARM, markersize=6)
    elif values:
        axes.axvline(steps[-1], color=ALARM, linestyle=":")
        axes.text(steps[-1], 0.95, "not finite ", **_AT_TOP, transform=axes.get_xaxis_transform())
    if limit is not None and math.isfinite(limit):
        axes.axhline(limit, color=LIMIT, linestyle="--", linewidth=1, label="limit")
        axes.legend(frameon=False, fontsize="small", loc="upper left")
    _logarithmic(axes, values)
    axes.set(xlabel="optimizer steps", ylabel=name)
    _finish(axes)


_AT_TOP: dict[str, Any] = {"ha": "right", "va": "top", "color": ALARM, "fontsize": "small"}


def _logarithmic(axes: Axes, values: Sequence[float]) -> None:
    """A spike of orders of magnitude would leave the rest of the curve a flat line."""
    finite = [value for value in values if math.isfinite(value)]
    if finite and min(finite) > 0 and max(finite) > 5 * min(finite):
        axes.set_yscale("log")


def _finish(axes: Axes) -> None:
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(which="both", labelsize="small")


def _or_nan(value: float) -> float:
    return value if math.isfinite(value) else math.nan


def _finite(score: float | None) -> float:
    """A score as the length of a bar."""
    return 0.0 if score is None else max(-10.0, min(score, 100.0))
