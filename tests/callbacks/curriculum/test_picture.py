"""The picture of a curriculum, and the losses that are kept for it."""

import json

from lightning_align.callbacks.curriculum.picture import MOST_POINTS, LossCurve, draw_run


def test_as_many_losses_are_kept_as_a_picture_shows() -> None:
    curve = LossCurve()
    for n in range(5000):
        if curve.wants(n):
            curve.note(n, float(n))
    assert MOST_POINTS / 2 <= len(curve.points) <= MOST_POINTS
    spaces = {b[0] - a[0] for a, b in zip(curve.points, curve.points[1:], strict=False)}
    assert len(spaces) == 1
    fresh = LossCurve()
    fresh.load_state_dict(json.loads(json.dumps(curve.state_dict())))
    fresh.note(5000, 1.0)
    curve.note(5000, 1.0)
    assert fresh.state_dict() == curve.state_dict()


def test_what_a_run_goes_back_behind_is_forgotten() -> None:
    curve = LossCurve()
    for n in (0, 1, 2, 3, 1, 2):
        curve.note(n, 10.0 + n)
    assert [point[0] for point in curve.points] == [0, 1, 2]


def test_a_panel_for_each_property_that_is_known() -> None:
    rows = [
        {"batch": n, "length": 8 + n, "tokens": None, "difficulty": {"a": n, "b": 2 * n}}
        for n in range(5)
    ]
    figure = draw_run(rows, [[0, 3.0], [4, 2.0]])
    labels = [axes.get_ylabel() for axes in figure.axes]
    assert labels == ["loss", "tokens of a row", "difficulty at most"]
    assert [len(axes.lines) for axes in figure.axes] == [1, 1, 2]
    assert figure.axes[1].lines[0].get_ydata().tolist() == [8, 9, 10, 11, 12]
    assert len(draw_run(rows, []).axes) == 2
