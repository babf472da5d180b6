"""What forward saves waits on disk until backward; the training is that of memory, to the bit."""

from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from lightning_align.modules import PretrainModule
from lightning_align.offload import activations
from tests.helpers.covers import cover
from tests.helpers.offloaded import ADAMW, Both, Regression, compare, points, small, text
from tests.helpers.tiny_models import TINY_MODELS, PlainDecoder
from tests.strategies.zero_infinity import test_ranks as ranks


class Moved(pl.Callback):
    """How many copies a step has made."""

    def __init__(self):
        self.counts = []

    def on_train_batch_end(self, trainer, *_):
        found = getattr(getattr(trainer.strategy, "_engine", None), "activations", None)
        if found is not None:
            self.counts.append(found._number)


@pytest.fixture
def moved(monkeypatch):
    monkeypatch.setattr(activations, "LEAST_BYTES", 1000)
    return Moved()


@cover(name=["llama", "plain"], recompute={"checkpointing": True, "all": False})
def test_language_models_train_as_in_memory(tmp_path, moved, name, recompute):
    build = {"plain": partial(PlainDecoder, dropout=0.2), **TINY_MODELS}[name]

    def module():
        torch.manual_seed(0)
        return PretrainModule(build(), optimizer=ADAMW, activation_checkpointing=recompute)

    data = Both(text())
    options = {"accumulate_grad_batches": 2, "val_check_interval": 4, "callbacks": [moved]}
    compare(tmp_path, module, data, small(offload_activations="nvme"), **options)
    blocks = 3
    counts = set(moved.counts)
    assert counts == {min(counts)}
    assert min(counts) >= blocks
    if recompute:  # the blocks' inputs, and the losses' hidden states
        assert min(counts) <= 2 * blocks + 4


class Recomputes(Regression):
    reentrant = False

    def forward(self, x):
        x = self.inlet(x)
        for part in self.parts:
            x = x + checkpoint(part, x, use_reentrant=self.reentrant)
        return self.outlet(self.norm(x))


class RecomputesReentrantly(Recomputes):
    reentrant = True


@cover(kind=[Regression, Recomputes, RecomputesReentrantly], where=["nvme", "cpu"])
def test_a_module_written_by_hand_trains_as_in_memory(tmp_path, moved, kind, where):
    data = points(16)
    strategy = small(offload_activations=where)
    compare(tmp_path, lambda: kind(ADAMW), data, strategy, callbacks=[moved])
    assert (min(moved.counts) >= 4) == (where == "nvme")


def test_each_rank_moves_its_own(tmp_path, moved):
    def build():
        model = TINY_MODELS["llama"]()
        return PretrainModule(model, optimizer=ADAMW, activation_checkpointing=True)

    ranks.compare(tmp_path, build, ranks.text, arguments={"offload_activations": "nvme"})
