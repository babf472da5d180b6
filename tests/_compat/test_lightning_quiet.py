"""Each message that is left out is still there to be left out, and nothing else is."""

import logging
import warnings

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import WandbLogger
from torch.utils.data import DataLoader

from lightning_align._compat import lightning_quiet
from lightning_align._compat.lightning_quiet import NoBatches


def run(tmp_path, val):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    trainer = pl.Trainer(max_steps=1, default_root_dir=tmp_path, **quiet)
    trainer.fit(BoringModel(), DataLoader(torch.ones(1, 32)), val)
    return trainer


def warned(tmp_path, val):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lightning_quiet.begin()
        run(tmp_path, val)
        lightning_quiet.end()
        hidden = {str(each.message) for each in caught}
        caught.clear()
        run(tmp_path, val)
    return hidden, {str(each.message) for each in caught}


def test_a_run_without_held_out_samples_warns_of_no_list_and_no_tree(tmp_path):
    """Lightning does, by itself: when it does not any more, the entry goes."""
    quiet, loud = warned(tmp_path, NoBatches())
    for part in ("LeafSpec", "Total length of `NoBatches`"):
        assert any(part in text for text in loud), part
        assert not any(part in text for text in quiet), part


def test_somebody_elses_empty_list_is_warned_of(tmp_path):
    quiet, _ = warned(tmp_path, [])
    assert any("Total length of `list`" in text for text in quiet)


def test_what_ends_takes_back_its_own_filters_only():
    with warnings.catch_warnings():
        before = list(warnings.filters)
        lightning_quiet.begin()
        warnings.filterwarnings("ignore", "in a fit")
        lightning_quiet.begin()
        assert len(warnings.filters) == len(before) + 1 + len(lightning_quiet.IN_A_FIT)
        lightning_quiet.end()
        added = [each for each in warnings.filters if each not in before]
        assert [each[1].pattern for each in added] == ["in a fit"]


def test_lightning_advertises_no_packages_and_says_the_rest(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger=lightning_quiet._TIPS_LOGGER)  # others may have set it
    pl.Trainer(max_steps=1, default_root_dir=tmp_path)
    told = caplog.text
    assert "GPU available" in told
    assert "Tip:" not in told
    logging.getLogger(lightning_quiet._TIPS_LOGGER).removeFilter(lightning_quiet._is_no_tip)
    try:
        pl.Trainer(max_steps=1, default_root_dir=tmp_path)
        assert "Tip: For seamless cloud logging" in caplog.text
    finally:
        lightning_quiet.leave_out_tips()


def test_wandb_has_nothing_to_complain_of(tmp_path, capfd):
    loggers = [WandbLogger(save_dir=tmp_path / name, offline=True) for name in ("a", "b")]
    loggers[0].experiment.finish()
    loud = capfd.readouterr().err
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    lightning_quiet.prepare_loggers(pl.Trainer(logger=loggers[1], **quiet))
    loggers[1].experiment.finish()
    silent = capfd.readouterr().err
    assert "WARNING git root" in loud
    assert "WARNING" not in silent
    before, after = (logger._wandb_init for logger in loggers)
    assert before["anonymous"] is None  # of which wandb warns once in a process
    assert {**after, "anonymous": None, "dir": 0} == {**before, "dir": 0}


@pytest.mark.parametrize("logger", [False, True])
def test_other_loggers_are_left_alone(tmp_path, logger):
    trainer = pl.Trainer(logger=logger, default_root_dir=tmp_path, enable_progress_bar=False)
    lightning_quiet.prepare_loggers(trainer)
