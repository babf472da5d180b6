"""What a run says of its traffic: beforehand, while blocks are written, and in its logs."""

from __future__ import annotations

import csv
import logging
from functools import partial

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from lightning_align import Muon
from lightning_align.modules import PretrainModule
from lightning_align.offload.bandwidth import step_bytes, total
from lightning_align.strategies.zero_infinity import counters
from lightning_align.strategies.zero_infinity.counters import Mark, layout_of, rates
from tests.helpers.offloaded import STEPS, Regression, fit, points, small, text
from tests.helpers.tiny_models import TINY_MODELS


def test_rates_of_ten_seconds():
    """2 steps in 10 s, of which 2 s were waited: 40 GB in 5 s.

    The efficiency without overlap: 8 s of compute beside 5 s of transfers are 8 / 13.
    """
    before, gb = Mark(3, 100.0, 5, 7, 1.0, 1.0), 10**9
    found = rates(before, Mark(5, 110.0, 5 + 30 * gb, 7 + 10 * gb, 3.0, 6.0))
    assert found == pytest.approx(
        {
            "read_gb_per_step": 15,
            "written_gb_per_step": 5,
            "read_gb_per_s": 3,
            "written_gb_per_s": 1,
            "stall_share": 0.2,
            "efficiency": 0.8,
            "drive_gb_per_s": 8,
            "efficiency_without_overlap": 8 / 13,
        }
    )
    assert "drive_gb_per_s" not in rates(before, Mark(5, 110.0, 5, 7, 1.0, 1.0))


@pytest.mark.parametrize("window", [1, 2])
def test_loggers_get_what_a_step_has_moved(tmp_path, window):
    """By the formula, in the rows of the steps that Lightning itself logs."""
    logger, strategy = CSVLogger(tmp_path), small()
    data = points()
    options = {"logger": logger, "log_every_n_steps": 1, "accumulate_grad_batches": window}
    fit(tmp_path, Regression(), data, strategy, **options)
    with open(f"{logger.log_dir}/metrics.csv") as file:
        rows = list(csv.DictReader(file))
    ours = [row for row in rows if row["zero_infinity/read_gb_per_step"]]
    assert [row["step"] for row in ours] == [str(n) for n in range(STEPS // window)]
    assert {row["step"] for row in rows if row["loss"]} == {row["step"] for row in ours}
    expected = total(step_bytes(layout_of(strategy._engine, window, gradients_wait=False)))
    last = {name: float(value) for name, value in ours[-1].items() if value and "/" in name}
    assert last["zero_infinity/read_gb_per_step"] == pytest.approx(expected.read / 1e9)
    assert last["zero_infinity/written_gb_per_step"] == pytest.approx(expected.written / 1e9)
    assert last["zero_infinity/resident_gb"] > 0
    assert 0 < last["zero_infinity/efficiency"] <= 1


def test_what_lies_in_host_memory_is_resident_too(tmp_path):
    """Values and two moments; no block is ever copied into a buffer."""
    logger, module = CSVLogger(tmp_path), Regression()
    data = points()
    options = {"logger": logger, "log_every_n_steps": 1, "max_steps": 2}
    fit(tmp_path, module, data, "zero_infinity_cpu", **options)
    with open(f"{logger.log_dir}/metrics.csv") as file:
        found = [row["zero_infinity/resident_gb"] for row in csv.DictReader(file)]
    states = 12 * sum(p.numel() for p in module.parameters()) / 1e9
    assert states <= float(found[-1] or found[-2]) < 1.5 * states  # padded to pages


@pytest.mark.parametrize(
    ("options", "waits"), [({}, False), ({"gradient_clip_val": 1.0}, True)], ids=["early", "late"]
)
def test_set_up_tells_what_a_step_moves(tmp_path, caplog, options, waits):
    with caplog.at_level(logging.INFO, "lightning.pytorch"):
        data = points()
        fit(tmp_path, Regression(), data, small(), max_steps=1, **options)
    assert "5,713 parameters: 4 blocks of up to 0.0 MB, of which 2 are" in caplog.text
    assert "bytes a parameter" in caplog.text
    assert ("its gradients wait" in caplog.text) is waits


def test_set_up_says_if_the_size_of_the_state_is_not_known(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "lightning.pytorch"):
        module = PretrainModule(TINY_MODELS["llama"](), optimizer=partial(Muon, lr=0.1))
        fit(tmp_path, module, text(), small(), max_steps=1)
    assert "its size is not known yet" in caplog.text


def test_tokens_are_told_where_the_drive_was_measured(tmp_path, caplog):
    strategy = small()
    fit(tmp_path, Regression(), points(), strategy, max_steps=1)
    layout = layout_of(strategy._engine, 1, gradients_wait=False)
    with caplog.at_level(logging.INFO, "lightning.pytorch"):
        counters.tell(strategy._engine, layout, bandwidth=2e9)
    assert "At 2.00 GB/s that takes" in caplog.text


@pytest.mark.parametrize("shown", [True, False])
def test_a_bar_shows_what_is_written_at_set_up(tmp_path, monkeypatch, shown):
    bars = []

    class Bar:
        def __init__(self, **options):
            self.options, self.written = options, 0
            bars.append(self)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def update(self, nbytes):
            self.written += nbytes

    monkeypatch.setattr(counters, "tqdm", Bar)
    data, strategy = points(), small()
    fit(tmp_path, Regression(), data, strategy, max_steps=1, enable_progress_bar=shown)
    (bar,) = bars
    assert bar.options["disable"] is not shown
    assert bar.written == bar.options["total"] == sum(b.nbytes for b in strategy._engine.blocks)


def test_counting_changes_nothing_that_is_resumed(tmp_path):
    """The callback has no state, and logs nothing that a checkpoint would keep."""
    trainer = fit(tmp_path, Regression(), points(), small())
    (callback,) = [c for c in trainer.callbacks if isinstance(c, counters.LogTraffic)]
    assert callback.state_dict() == {}
    assert not [name for name in trainer.callback_metrics if name.startswith("zero_infinity")]
    assert torch.isfinite(trainer.callback_metrics["loss"])
