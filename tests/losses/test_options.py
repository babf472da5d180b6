"""PreferenceOptions: checked once, frozen, and no option of another loss goes unnoticed."""

from dataclasses import FrozenInstanceError

import pytest
import torch

from lightning_align.losses import LOSSES, CompletionScores, PairScores, PreferenceOptions
from lightning_align.losses.options import READS


class Watched:
    """Options, or scores, that remember what was asked of them."""

    def __init__(self, watched, asked):
        self._watched, self._asked = watched, asked

    def __getattr__(self, name):
        self._asked.add(name)
        value = getattr(self._watched, name)
        return Watched(value, self._asked) if isinstance(value, CompletionScores) else value


@pytest.mark.parametrize("loss_type", LOSSES)
def test_a_loss_reads_what_the_table_says(loss_type):
    completions = [CompletionScores(*torch.randn(2, 3), torch.tensor([1, 2, 3])) for _ in range(2)]
    options, scores = PreferenceOptions(loss_type), PairScores(*completions)
    asked = set()
    LOSSES[loss_type](Watched(scores, asked), Watched(options, asked))
    every_loss = {"beta", "margin", "logratios", "chosen", "rejected"}
    assert asked - every_loss == set(READS[loss_type])


def test_the_table_has_every_loss():
    assert READS.keys() == LOSSES.keys()


def test_options_are_what_they_were_checked_to_be():
    options = PreferenceOptions("cdpo", beta=0.3, label_smoothing=0.1)
    with pytest.raises(FrozenInstanceError):
        options.beta = -1.0
    assert options == PreferenceOptions("cdpo", 0.3, 0.1, where="elsewhere")


def test_several_names_are_no_name():
    with pytest.raises(
        ValueError, match=r"PreferenceOptions\(loss_type=\['sigmoid'\]\): must be one"
    ):
        PreferenceOptions(loss_type=["sigmoid"])
