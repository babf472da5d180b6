import math

import pytest

from lightning_align.reports.spike_pictures import draw_incident, draw_overview
from lightning_align.spike_causes import Cause
from tests.test_spike_incidents import an_incident


def texts(figure):
    found = [figure.get_suptitle(), figure.get_supxlabel()]
    for axes in figure.axes:
        found += [axes.get_ylabel(), *(text.get_text() for text in axes.texts)]
        found += [label.get_text() for label in axes.get_yticklabels()]
    return found


def test_an_incident_shows_curve_limits_layers_and_cause():
    figure = draw_incident(an_incident(loss_limit=2.0, grad_norm=3.0))
    loss, norm, layers = figure.axes
    assert [line.get_ydata()[-1] for line in loss.lines][-1] == 2.0
    assert norm.get_ylabel() == "gradient norm"
    assert "layers.0" in texts(figure)
    assert "Step 160, batch 321: skip; numerics in layers.0" in texts(figure)
    assert len(layers.patches) == 1


@pytest.mark.parametrize("loss", [math.nan, math.inf, 9.5])
def test_values_that_are_not_finite_are_said(loss):
    incident = an_incident(history={"step": [1, 2], "loss": [1.0, loss], "grad_norm": [1.0, 1.0]})
    figure = draw_incident(incident)
    figure.draw_without_rendering()
    assert ("not finite " in texts(figure)) == (not math.isfinite(loss))


def test_an_incident_of_which_little_is_known_is_drawn():
    bare = an_incident(layers=[], history={}, cause=None, grad_norm=None)
    draw_incident(bare).draw_without_rendering()


def test_the_overview_has_a_line_per_incident_and_a_colour_per_action():
    curve = {"step": range(200), "loss": [2.0] * 199 + [math.nan], "grad_norm": [0.5] * 200}
    incidents = [
        an_incident(step=step, action=action, cause=Cause("data"))
        for step, action in [(10, "skip"), (20, "skip"), (30, "rewind")]
    ]
    figure = draw_overview(curve, incidents)
    figure.draw_without_rendering()
    assert [line.get_xdata()[0] for line in figure.axes[0].lines[1:]] == [10, 20, 30]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["skip", "rewind"]
