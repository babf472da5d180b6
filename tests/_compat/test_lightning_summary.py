"""What a fit says first: parameters, and no FLOPs that nobody has counted."""

import logging

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelSummary, RichModelSummary
from torch.utils.data import DataLoader
from transformers import LlamaConfig

from lightning_align.modules.pretrain import PretrainModule
from tests.helpers.recorder import trainer

SIZES = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}


class Example(PretrainModule):
    """With an example of its input, of which Lightning counts."""

    @property
    def example_input_array(self):
        return torch.zeros(1, 4, dtype=torch.long)


class Mine(ModelSummary):
    """A user's own class."""


def first_lines(tmp_path, kind, summary, capsys, caplog):
    config = LlamaConfig(vocab_size=16, num_attention_heads=1, **SIZES)
    batch = {name: torch.arange(9)[None] for name in ("input_ids", "labels")}
    fitter = trainer(tmp_path, callbacks=[summary], enable_model_summary=True)
    with caplog.at_level(logging.INFO, logger="lightning.pytorch"):
        fitter.fit(kind(config), DataLoader([batch], batch_size=None))
    return capsys.readouterr().out + caplog.text


@pytest.mark.parametrize("summary", [ModelSummary, RichModelSummary])
def test_nothing_is_said_of_flops(tmp_path, capsys, caplog, summary):
    said = first_lines(tmp_path, PretrainModule, summary(), capsys, caplog)
    assert "flops" not in said.lower()
    for part in ("LlamaForCausalLM", "Trainable params", "Total params", "Modules in train mode"):
        assert part in said


@pytest.mark.parametrize("summary", [ModelSummary, RichModelSummary])
def test_flops_that_were_counted_are_said(tmp_path, capsys, caplog, summary):
    said = first_lines(tmp_path, Example, summary(), capsys, caplog)
    assert "total flops" in said.lower()


def test_a_summary_of_ones_own_is_left_alone(tmp_path, capsys, caplog):
    said = first_lines(tmp_path, PretrainModule, Mine(), capsys, caplog)
    assert "0         Total Flops" in said


def test_lightnings_table_still_ends_with_flops():
    """What is left out is the last line."""
    summary = ModelSummary()._summary(pl.Trainer(logger=False), pl.LightningModule())
    assert str(summary).splitlines()[-1].endswith("Total Flops")
    assert "FLOPs" in [name for name, _ in summary._get_summary_data()]
