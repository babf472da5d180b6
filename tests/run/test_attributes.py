"""What a module keeps in attributes is the same after a resume, to the last bit."""

import random
import warnings
from collections import Counter, defaultdict, deque, namedtuple
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import nn
from torchmetrics import MeanMetric

from lightning_align import ExactResume
from tests.helpers.ranks import ForkedRanks, run_ranks
from tests.helpers.resumable import (
    Fit,
    Plain,
    WithValidation,
    WriteDown,
    after_validation,
    async_checkpoint,
    every_batch,
    later,
    model_checkpoint,
    resumes,
)
from tests.helpers.resume import weights_hash


@contextmanager
def warnings_are_errors() -> Iterator[None]:
    """Nothing is named as lost."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    assert not [str(w.message) for w in caught if "ExactResume" in str(w.message)]


class Counts(Plain):
    """Its loss depends on how many batches there were."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.count += 1
        return self.loss(batch) * self.count


@pytest.mark.parametrize("savers", [model_checkpoint, async_checkpoint, every_batch])
def test_a_counter_goes_on(tmp_path: Path, savers: Any) -> None:
    resumes(Fit(tmp_path, Counts, savers), 2, 9)


def test_a_counter_goes_on_after_a_kill(tmp_path: Path) -> None:
    fit = Fit(tmp_path, Counts)
    fit.killed_at(9)
    resumed = fit.run("resumed", ckpt_path=fit.checkpoint(8))
    whole = fit.run()
    assert later(resumed, 8) == later(whole, 8)


class Phase(Enum):
    WARM = 1
    COLD = 2


@dataclass
class Seen:
    loss: float
    batch: int


Pair = namedtuple("Pair", "first second")


class Running:
    """A plain class of the user."""

    def __init__(self) -> None:
        self.total, self.history = 0.0, deque(maxlen=3)

    def update(self, value: float) -> float:
        self.total += value
        self.history.append(value)
        return self.total / 7 + sum(self.history)


class Collects(Plain):
    """One attribute of every kind that people write, all of which the loss depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.running, self.phase = Running(), Phase.WARM
        self.recent, self.per_label = deque(maxlen=4), defaultdict(list)
        self.records: list[Seen] = []
        self.array, self.scalar = np.zeros(3), np.float32(1)
        self.average = {n: p.detach().clone() for n, p in self.named_parameters()}
        self.extra: list[torch.Tensor] = [torch.ones(1, requires_grad=True)]
        self.draws = random.Random(1), torch.Generator().manual_seed(1), np.random.default_rng(1)
        self.metrics = {"mean": MeanMetric()}
        self.teacher = [deepcopy(self.body)]
        self.pair, self.kinds, self.view = Pair(0, [0]), {0}, self.body[0].weight.detach()
        self.alias = self.records
        self.lazy: Any = None

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        value = float(loss)
        self.recent.append(value)
        self.per_label[batch_idx % 2].append(value)
        self.alias.append(Seen(value, batch_idx))
        self.array[batch_idx % 3] += value
        self.scalar = np.float32(self.scalar * 0.9)
        self.pair = Pair(self.pair.first + 1, [*self.pair.second[-2:], value])
        self.kinds.add(len(self.kinds) % 5)
        self.phase = Phase.COLD if len(self.records) > 4 else Phase.WARM
        self.metrics["mean"].update(value)
        self.lazy = (self.lazy or Counter()) + Counter({"steps": 1})
        with torch.no_grad():
            for name, parameter in self.body.named_parameters():
                self.average[f"body.{name}"].lerp_(parameter, 0.1)
            for ours, theirs in zip(
                self.teacher[0].parameters(), self.body.parameters(), strict=True
            ):
                ours.data.mul_(0.9).add_(theirs.data, alpha=0.1)
        python, generator, numpy = self.draws
        factor = (
            self.running.update(value)
            + sum(self.recent)
            + sum(map(sum, self.per_label.values()))
            + sum(seen.loss * seen.batch for seen in self.records[-3:])
            + float(self.array.sum() + self.scalar + self.pair.first + sum(self.pair.second))
            + len(self.kinds) * self.phase.value
            + float(self.metrics["mean"].compute())
            + self.lazy["steps"]
            + sum(float(mean.sum()) for mean in self.average.values())
            + float(self.teacher[0](batch).sum())
            + python.random()
            + float(torch.rand((), generator=generator))
            + float(numpy.random())
        )
        return loss * factor * self.extra[0].square().sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam([*self.parameters(), *self.extra], lr=1e-3)


@pytest.mark.parametrize("savers", [model_checkpoint, async_checkpoint])
def test_all_kinds_of_attributes_go_on(tmp_path: Path, savers: Any) -> None:
    with warnings_are_errors():
        resumes(Fit(tmp_path, Collects, savers), 8)


def test_unregistered_parameters_keep_their_waiting_gradients(tmp_path: Path) -> None:
    trainer = {"accumulate_grad_batches": 3}
    resumes(Fit(tmp_path, Collects, every_batch, trainer=trainer), 2)


class Averages(Plain):
    """Its average begins as the weights, which are those of the save on a resume."""

    losses: list[float] = []  # of the class  # noqa: RUF012

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        super().__init__()
        self.built = [p.detach().clone() for p in self.parameters()]
        self.losses.clear()

    def on_fit_start(self) -> None:
        self.average = [p.detach().clone() for p in self.parameters()]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.losses.append(float(loss))
        distance = 0.0
        for mean, slow, parameter in zip(self.average, self.built, self.parameters(), strict=True):
            for each in (mean, slow):
                each.lerp_(parameter.detach(), 0.1)
                distance += (parameter - each).square().sum()
        return loss + distance + len(self.losses) * loss


def test_what_began_as_weights_goes_on(tmp_path: Path) -> None:
    fit = Fit(tmp_path, Averages)
    whole = fit.run()
    with warnings_are_errors():
        resumed = fit.run("other", ckpt_path=fit.checkpoint(8), module=lambda: Averages(5))
    assert later(resumed, 8) == later(whole, 8)


class Inner(nn.Module):
    """A layer with a temperature of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = 1.0

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.temperature *= 0.9
        return rows / self.temperature


class Anneals(WithValidation):
    """Attributes of submodules, hyperparameters and modes that hooks change."""

    def __init__(self, alpha: float = 1.0) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.body.append(Inner())

    def on_train_epoch_start(self) -> None:
        self.hparams.alpha *= 0.5
        self.body[2].p = 0.1 * self.current_epoch
        if self.current_epoch == 1:
            self.body[2].eval()
        self.factor = float(torch.rand(()))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch) * self.hparams.alpha * self.factor


@pytest.mark.parametrize("savers", [model_checkpoint, async_checkpoint])
def test_submodules_hyperparameters_and_draws_of_an_epochs_start_go_on(
    tmp_path: Path, savers: Any
) -> None:
    resumes(Fit(tmp_path, Anneals, savers), 8)


def test_modes_are_those_of_training_where_a_validation_saves(tmp_path: Path) -> None:
    resumes(Fit(tmp_path, Anneals, after_validation, trainer={"val_check_interval": 4}), 10)


class AtTheEnd(WithValidation):
    """Hooks that Lightning calls after those of callbacks, and so after a save."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(4))
        self.seen, self.validated, self.epoch_losses = 0, 0, []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.epoch_losses.append(float(loss := self.loss(batch)))
        return loss * (1 + self.average.sum() + self.seen + self.validated)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.average.lerp_(batch.mean(0), 0.1)
        self.seen += 1

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.validated += 1  # also in the sanity check, which a resumed run has not
        super().validation_step(batch, batch_idx)

    def on_validation_end(self) -> None:
        self.validated *= 2

    def on_train_epoch_end(self) -> None:
        self.seen = sum(self.epoch_losses)
        self.epoch_losses.clear()


@pytest.mark.parametrize("savers", [model_checkpoint, async_checkpoint, every_batch])
def test_what_the_modules_own_hooks_do_at_the_end_of_a_batch_is_saved(
    tmp_path: Path, savers: Any
) -> None:
    resumes(Fit(tmp_path, AtTheEnd, savers), 2, 8)


def test_what_the_modules_own_hooks_do_at_the_end_of_a_validation_is_saved(tmp_path: Path) -> None:
    trainer = {"val_check_interval": 4, "num_sanity_val_steps": 2}
    resumes(Fit(tmp_path, AtTheEnd, after_validation, trainer=trainer), 4, 10)


class OwnSaving(Counts):
    """Saves its counter itself, under a name of its own."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["count"] = self.count

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.count = checkpoint["count"]


def test_what_a_module_saves_itself_is_left_to_it(tmp_path: Path) -> None:
    with warnings_are_errors():
        resumes(Fit(tmp_path, OwnSaving), 8)


class Weighted(Counts):
    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.weight *= 0.9
        return super().training_step(batch, batch_idx) * self.weight


def test_a_new_argument_of_the_user_wins_and_is_named(tmp_path: Path) -> None:
    fit = Fit(tmp_path, Weighted)
    fit.run()
    begun: list[Weighted] = []

    def other() -> Weighted:
        begun.append(Weighted(5.0))
        return begun[0]

    with pytest.warns(UserWarning, match=r"ExactResume: \['weight'\] of Weighted begin otherwise"):
        fit.run("other", ckpt_path=fit.checkpoint(8), module=other, max_steps=9)
    assert begun[0].weight == 5.0 * 0.9
    assert begun[0].count == 9


class Lost(Counts):
    """Holds what no checkpoint can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = (number for number in range(100))
        self.log_file = open(Path(__file__))  # noqa: SIM115
        self.unchanged = object()
        self.function = lambda value: value


def test_what_cannot_be_saved_is_named_once(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="cannot be written into a checkpoint") as caught:
        Fit(tmp_path, Lost).run()
    named = [str(w.message) for w in caught if "ExactResume" in str(w.message)]
    assert len(named) == 1
    assert "['log_file', 'numbers'] of Lost" in named[0]


class Refers(Counts):
    """Keeps what belongs to the Trainer at hand, beside what counts."""

    def on_train_start(self) -> None:
        self.at_hand = {"trainer": self.trainer, "loggers": self.trainer.loggers, "count": 0}

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loop = self.trainer.fit_loop
        self.loop, self.parts = loop, [loop.epoch_loop.val_loop, loop.epoch_progress]
        self.precision = self.trainer.strategy.precision_plugin
        self.state, self.saver = self.trainer.state, self.trainer.checkpoint_callback
        self.at_hand["count"] += 1
        return super().training_step(batch, batch_idx) * (1 + self.at_hand["count"] % 5)


def test_what_is_the_trainers_is_a_link(tmp_path: Path) -> None:
    fit = Fit(tmp_path, Refers, every_batch)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="ExactResume")
        resumes(fit, 8)
    saved = torch.load(fit.checkpoint(8), weights_only=True)["lightning_align.attributes"][0]
    assert saved["loop"][1] == ("link", "trainer: fit_loop")
    assert {kind for kind, _ in saved["parts"][1][2]} == {"link"}


def test_checkpoints_load_as_plain_data_and_old_ones_still_resume(tmp_path: Path) -> None:
    fit = Fit(tmp_path, Counts)
    fit.run()
    path = fit.checkpoint(8)
    state = torch.load(path, weights_only=True)
    (attributes,) = state["lightning_align.attributes"]
    assert attributes["count"][1] == 8
    assert attributes.keys() == {"count"}, "only what the run has changed"
    for key in ("attributes", "settings"):
        del state[f"lightning_align.{key}"]
    torch.save(state, path)
    assert len(later(fit.run("old", ckpt_path=path), 8)) > 5


class OnRanks(Counts):
    """A value of its own on each rank."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.own = getattr(self, "own", 0.0) + float(batch.sum())
        return super().training_step(batch, batch_idx) * (1 + self.own)


def test_each_rank_goes_on_with_its_own(tmp_path: Path) -> None:
    def on(rank: int) -> bool:
        trainer = {
            "devices": 2,
            "strategy": "ddp",
            "plugins": [ForkedRanks(rank, 2)],
            "limit_train_batches": 3,
        }
        resumes(Fit(tmp_path, OnRanks, trainer=trainer), 2, 4)
        return True

    assert run_ranks(on) == [True, True]


def test_fewer_ranks_take_what_was_the_same_on_all(tmp_path: Path) -> None:
    def on(rank: int) -> None:
        ranks = {"devices": 2, "strategy": "ddp", "plugins": [ForkedRanks(rank, 2)]}
        trainer = {**ranks, "limit_train_batches": 3}
        Fit(tmp_path, OnRanks, trainer=trainer).run()

    run_ranks(on)
    built: list[OnRanks] = []

    def module() -> OnRanks:
        built.append(OnRanks())
        return built[0]

    fit = Fit(tmp_path, module)
    with pytest.warns(UserWarning, match=r"\['own'\] had another value on each"):
        fit.run("one", ckpt_path=fit.checkpoint(2), max_steps=3)
    assert built[0].count == 3


def test_what_a_validated_checkpoint_holds_is_not_put_into_a_fit(tmp_path: Path) -> None:
    trainer = {"accumulate_grad_batches": 3}
    fit = Fit(tmp_path, WithValidation, every_batch, trainer=trainer)
    whole = fit.run()
    exact = ExactResume()
    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, **trainer}
    written = WriteDown(tmp_path / "again")
    again = pl.Trainer(max_epochs=3, callbacks=[written, exact], **options)
    pl.seed_everything(3, verbose=False)
    module = WithValidation()
    state = {name: value.clone() for name, value in module.state_dict().items()}
    again.validate(module, ckpt_path=fit.checkpoint(2), verbose=False)
    module.load_state_dict(state)
    again.fit(module)
    assert weights_hash(module) == whole[-1]


class Buffers(WithValidation):
    """A buffer that no state_dict holds, and BatchNorm, whose statistics are each rank's own."""

    def __init__(self) -> None:
        super().__init__()
        self.body.insert(1, nn.BatchNorm1d(8))
        self.register_buffer("hidden", torch.zeros(2), persistent=False)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.hidden += loss.detach()
        return loss * self.hidden.sum()


@pytest.mark.parametrize("savers", [model_checkpoint, async_checkpoint])
def test_buffers_outside_of_the_state_dict_go_on(tmp_path: Path, savers: Any) -> None:
    resumes(Fit(tmp_path, Buffers, savers), 8)


def test_buffers_of_each_rank_go_on(tmp_path: Path) -> None:
    def on(rank: int) -> None:
        ranks = {"devices": 2, "strategy": "ddp", "plugins": [ForkedRanks(rank, 2)]}
        trainer = {**ranks, "val_check_interval": 1, "num_sanity_val_steps": 0}
        resumes(Fit(tmp_path, Buffers, after_validation, trainer=trainer), 2, 4)

    run_ranks(on)


def test_buffers_of_each_rank_go_on_in_an_open_window(tmp_path: Path) -> None:
    def on(rank: int) -> None:
        ranks = {"devices": 2, "strategy": "ddp", "plugins": [ForkedRanks(rank, 2)]}
        trainer = {**ranks, "accumulate_grad_batches": 3}
        resumes(Fit(tmp_path, Buffers, every_batch, trainer=trainer), 1, 2)

    run_ranks(on)
