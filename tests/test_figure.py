"""Figures, with matplotlib and without."""

import sys

import pytest

from lightning_align.figure import new_figure


def test_a_figure_is_as_large_as_asked_for() -> None:
    assert new_figure(3, 2).get_size_inches().tolist() == [3, 2]


def test_missing_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install lightning-align\[plot\]"):
        new_figure(2, 1)
