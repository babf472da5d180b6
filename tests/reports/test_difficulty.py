import numpy as np
import pytest

from lightning_align.data.difficulty import DifficultyIndex
from lightning_align.reports.difficulty import (
    describe_difficulty,
    draw_difficulty,
    percentile,
)

VALUES = [10, 20, 20, 30, 40, 50, 60, 70, 80, 90]


def test_a_percentile_is_the_least_that_so_many_do_not_exceed():
    index = DifficultyIndex.of_values(VALUES)
    found = [percentile(index, percent) for percent in (0, 10, 11, 30, 31, 100)]
    assert found == [10, 10, 20, 20, 30, 90]


def test_an_index_in_two_lines():
    index = DifficultyIndex.of_values(np.arange(5000), name="loss").merged(10)
    first, second = describe_difficulty(index)
    assert first == "loss: 5,000 samples, 10 levels (finer difficulties are joined)"
    assert second.startswith("  0 %: 499, ")


def test_an_index_that_orders_little_says_so():
    lines = describe_difficulty(DifficultyIndex.of_values([129] * 99 + [78]))
    assert lines[2] == "  99.0% of the samples are equally difficult: no order is among them"
    assert len(describe_difficulty(DifficultyIndex.of_values(VALUES))) == 2


def test_the_histogram_has_every_sample():
    pytest.importorskip("matplotlib")
    figure = draw_difficulty([DifficultyIndex.of_values(VALUES, name="loss_of_it")] * 2)
    axes = figure.axes[0]
    assert axes.get_xlabel() == "loss of it"
    assert axes.patches[0].get_data().values.sum() == len(VALUES)
