"""Captured, trained on, put back, and trained on again: the same bits, as often as one likes."""

import logging
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    GradientAccumulationScheduler,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy
from torchmetrics import MeanMetric

from lightning_align import LISA, ExactResume, PipelineStrategy, ZeROInfinityStrategy
from lightning_align.layers.sharding import own_part
from lightning_align.run.capture import RunState, capture, check_goes_back, restore
from lightning_align.run.position import batches_consumed
from tests.helpers.foreign import Stranger
from tests.helpers.ranks import ForkedRanks, run_ranks
from tests.helpers.resumable import Plain
from tests.helpers.resume import SequenceData, gpt2_module
from tests.helpers.rewinds import Rewinds


class Everything(Stranger):
    """What a module can count, average and collect, beside parameters."""

    seen_by_class: list[int] = []  # noqa: RUF012

    def __init__(self, loader_name: str = "shuffled", plateau: str = "") -> None:
        super().__init__(loader_name, plateau=plateau)
        self.body.insert(1, torch.nn.BatchNorm1d(16))
        self.count, self.history = 0, []
        self.average = {name: p.detach().clone() for name, p in self.named_parameters()}
        self.seldom = MeanMetric()
        self.register_buffer("steps", torch.zeros(()), persistent=False)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx) * (1 + 0.01 * self.count)
        if batch_idx % 3 == 2:
            self.seldom.update(loss.detach())
        if self.count > 3:
            self.late = loss.detach()  # an attribute that is not there from the beginning
        self.steps += 1
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.count += 1
        self.history.append(float(outputs["loss"]))
        for name, parameter in self.named_parameters():
            self.average[name].lerp_(parameter.detach(), 0.1)


class Counts(pl.Callback):
    """A callback with a state, and a wish to stop."""

    def __init__(self) -> None:
        self.batches = 0

    def on_train_batch_end(self, *_: Any) -> None:
        self.batches += 1

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self.batches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.batches = state["batches"]


class Record(pl.Callback):
    """Loss, metrics, and a digest of all state after every batch, validation and epoch."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        optimizer = exact(trainer.optimizers[0].state_dict())
        self.note(trainer, "batch", float(outputs["loss"]).hex(), optimizer)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.note(trainer, "validation")

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.note(trainer, "epoch")

    def note(self, trainer: Any, what: str, *more: Any) -> None:
        module = trainer.lightning_module
        names = ("count", "history", "average", "steps", "late", "accumulated", "_tokens_seen")
        attributes = {name: getattr(module, name, None) for name in names}
        modules = module.named_modules()
        sums = {name: m.metric_state for name, m in modules if isinstance(m, MeanMetric)}
        metrics = {k: v for k, v in trainer.callback_metrics.items() if k != "tokens_per_second"}
        state = (module.state_dict(), attributes, sums, metrics)
        counts = [each.batches for each in trainer.callbacks if isinstance(each, Counts)]
        self.lines.append(f"{batches_consumed(trainer)} {what} {more} {counts} {exact(state)}")


def exact(value: Any) -> Any:
    """Nested state as text, to the last bit."""
    if isinstance(value, torch.Tensor):
        bits = own_part(value.detach()).double().numpy().tobytes()
        return f"{value.dtype}{tuple(value.shape)}{hash(bits)}"
    if isinstance(value, dict):
        return {key: exact(item) for key, item in value.items()}
    return [exact(item) for item in value] if isinstance(value, (list, tuple)) else repr(value)


def fit(
    module: pl.LightningModule,
    *callbacks: pl.Callback,
    data: Any = None,
    ckpt_path: Any = None,
    **options: Any,
) -> list[str]:
    """What a run of three epochs has recorded."""
    torch.set_num_threads(1)
    for logger in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    record = Record()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?!ExactResume)")
        trainer = pl.Trainer(
            **{
                "max_epochs": 3,
                "accelerator": "cpu",
                "logger": False,
                "enable_checkpointing": False,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "callbacks": [ExactResume(), record, *callbacks],
                **options,
            }
        )
        trainer.fit(module, data, ckpt_path=ckpt_path)
    return record.lines


Parts = tuple[pl.LightningModule, list[pl.Callback], Any]  # module, callbacks, datamodule


def run(build: Callable[[], Parts], *last: pl.Callback, **options: Any) -> list[str]:
    pl.seed_everything(3, verbose=False)
    module, callbacks, data = build()
    return fit(module, *callbacks, *last, data=data, **options)


undisturbed = cache(run)  # what many rewinds are compared with


def rewinds(build: Callable[[], Parts], at: int, until: int, **options: Any) -> list[str]:
    """The law: a run that goes back twice records what followed each time, bit for bit."""
    whole = undisturbed(build, **options)
    ours = run(build, Rewinds(at, until, times=2), **options)
    places = [line.split()[:2] for line in whole]
    begins, ends = (places.index([str(n), "batch"]) + 1 for n in (at, until))
    expected = [*whole[:ends], *whole[begins:ends], *whole[begins:]]
    for number, (one, other) in enumerate(zip(ours, expected, strict=True)):
        assert one == other, f"line {number}, at {other.split()[:2]}"
    return whole


def everything(loader: str = "shuffled", plateau: str = "") -> Parts:
    return Everything(loader, plateau), [Counts()], None


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("persistent", "stream-workers")]
LOADERS = [
    *("shuffled", "generator", "workers", "stream", "stateful", "stateful-stream", "two", "mixed"),
    *SLOW,
]


@pytest.mark.parametrize("loader", LOADERS)
def test_all_kinds_of_loaders_go_back_to_the_same_batch(loader: str) -> None:
    rewinds(lambda: everything(loader), 2, 4)


@pytest.mark.parametrize(
    ("at", "until"),
    [(1, 5), (5, 5), (4, 6), (6, 6), (4, 8), (6, 10), (2, 18)],
)
def test_within_epochs_at_their_ends_and_across_them(at: int, until: int) -> None:
    """Epochs have six batches; each is followed by a validation."""
    rewinds(everything, at, until)


@pytest.mark.parametrize(("at", "until"), [(2, 4), (5, 9)])
def test_in_mid_window(at: int, until: int) -> None:
    rewinds(everything, at, until, accumulate_grad_batches=3)


@pytest.mark.parametrize(("at", "until"), [(3, 5), (2, 10)])
def test_validations_in_mid_epoch_follow_again(at: int, until: int) -> None:
    whole = rewinds(everything, at, until, val_check_interval=3)
    assert sum("validation" in line for line in whole) > 3


@pytest.mark.parametrize("plateau", ["step", "epoch"])
def test_schedulers_that_watch_a_metric(plateau: str) -> None:
    rewinds(lambda: everything(plateau=plateau), 4, 8)


@pytest.mark.parametrize("plateau", ["step", "epoch"])
def test_in_the_epoch_that_a_resumed_run_begins_in(tmp_path: Path, plateau: str) -> None:
    saves = Calls("on_train_batch_end", lambda trainer: trainer.save_checkpoint(tmp_path / "ckpt"))
    pl.seed_everything(3, verbose=False)
    fit(*everything(plateau=plateau)[:1], Counts(), saves, max_steps=2)
    resumed = {"ckpt_path": tmp_path / "ckpt"}
    build = lambda: everything(plateau=plateau)  # noqa: E731
    rewinds(build, 4, 5, **resumed)
    rewinds(build, 4, 9, **resumed)


class Freezes(Everything):
    """Freezes, clips and lets BatchNorm rest by epoch."""

    def on_train_epoch_start(self) -> None:
        self.body[0].requires_grad_(self.current_epoch != 1)
        self.body[1].train(self.current_epoch != 1)
        self.trainer.gradient_clip_val = 0.1 * (1 + self.current_epoch)


def test_what_hooks_of_a_later_epoch_have_set() -> None:
    more = GradientAccumulationScheduler({0: 1, 1: 2})
    build = lambda: (Freezes(), [more], None)  # noqa: E731
    rewinds(build, 4, 8)
    rewinds(build, 9, 14)


def test_max_steps() -> None:
    rewinds(everything, 4, 8, max_epochs=-1, max_steps=10)


def ours(*callbacks: Callable[[], pl.Callback], num_workers: int = 0) -> Parts:
    return gpt2_module(), [make() for make in callbacks], SequenceData(num_workers)


def lisa() -> pl.Callback:
    return LISA(activated_layers=1, interval_steps=3, reactivation_warmup_steps=2, filename=None)


@pytest.mark.parametrize(("at", "until", "accumulate"), [(3, 5, 1), (9, 13, 1), (4, 12, 2)])
def test_our_module_under_lisa(at: int, until: int, accumulate: int) -> None:
    """Draws change every three steps, and come within the batches that are taken back."""
    rewinds(lambda: ours(lisa), at, until, accumulate_grad_batches=accumulate, max_epochs=2)


def test_our_module_with_workers() -> None:
    rewinds(lambda: ours(num_workers=2), 3, 5, accumulate_grad_batches=2, max_epochs=1)


@pytest.mark.parametrize(
    "build",
    [
        everything,
        lambda: ours(lisa),
        pytest.param(lambda: ours(num_workers=2), marks=pytest.mark.slow),
    ],
    ids=["any", "lisa", "workers"],
)
def test_on_two_ranks(build: Callable[[], Parts]) -> None:
    """In mid-window, and across an epoch's end."""

    def on(rank: int) -> None:
        ranks = {"devices": 2, "strategy": "ddp", "plugins": ForkedRanks(rank, 2)}
        rewinds(build, 1, 3, accumulate_grad_batches=2, max_epochs=2, **ranks)
        rewinds(build, 2, 5, accumulate_grad_batches=2, max_epochs=2, **ranks)

    run_ranks(on, timeout_s=120.0)


def test_on_two_ranks_that_shuffle_by_themselves_with_a_validation_in_mid_epoch() -> None:
    def on(rank: int) -> None:
        ranks = {"devices": 2, "strategy": "ddp", "plugins": ForkedRanks(rank, 2)}
        rewinds(everything, 2, 4, max_epochs=2, val_check_interval=2, **ranks)

    run_ranks(on)


def test_a_state_shares_nothing_with_the_run_and_is_not_used_up() -> None:
    class Checks(Rewinds):
        def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
            super().on_train_batch_end(trainer, *rest)
            if self.state is not None:
                held = exact([vars(self.state)[name] for name in NAMES])
                self.held = getattr(self, "held", held)
                assert held == self.held, f"after {batches_consumed(trainer)} batches"

    NAMES = ("checkpoint", "attributes", "window", "means", "settings")
    pl.seed_everything(3, verbose=False)
    module, callbacks, _ = everything()
    fit(module, *callbacks, Checks(4, 8, times=3), accumulate_grad_batches=3)


class Spikes(pl.Callback):
    """A guard in twenty lines: decides before a step, drops its gradients, goes back behind it."""

    def __init__(self, spike: bool = True) -> None:
        self.state: RunState | None = None
        self.spike, self.goes_back = spike, False

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if batches_consumed(trainer) == 4 and self.spike:
            self.spike, self.goes_back = False, True
            for parameter in pl_module.parameters():
                parameter.grad = None

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if batches_consumed(trainer) == 2:
            self.state = self.state or capture(trainer)
        if self.goes_back:
            self.goes_back = False
            assert self.state is not None
            restore(trainer, self.state)


def test_what_is_decided_before_a_step_goes_back_at_the_end_of_its_batch() -> None:
    def run(spike: bool) -> list[str]:
        pl.seed_everything(3, verbose=False)
        module, callbacks, _ = everything()
        return fit(module, *callbacks, Spikes(spike))

    whole, ours = run(spike=False), run(spike=True)
    assert ours[-len(whole) + 3 :] == whole[3:], "from batch 3 on: a sanity check is not recorded"


def test_a_wish_to_stop_that_came_later_is_taken_back() -> None:
    class Wishes(pl.Callback):
        granted = False

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if batches_consumed(trainer) == 4 and not self.granted:
                self.granted = trainer.should_stop = True

    pl.seed_everything(3, verbose=False)
    lines = fit(everything()[0], Wishes(), Rewinds(2, 4, times=1))
    assert lines[-1].startswith("18 epoch")


def test_callbacks_that_write_files_keep_what_they_know_of_them(tmp_path: Path) -> None:
    saves = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=3)  # keeps the newest
    pl.seed_everything(3, verbose=False)
    module, callbacks, _ = everything()
    rewind = Rewinds(4, 7, times=1)  # the file of step 6 is there, and that of step 3 is not
    fit(module, *callbacks, rewind, saves, enable_checkpointing=True)
    assert rewind.times == 0
    assert [path.name for path in tmp_path.glob("*.ckpt")] == ["step=18.ckpt"]
    assert saves.best_model_path.endswith("step=18.ckpt")


class Calls(pl.Callback):
    """Calls a function in one hook, once."""

    def __init__(self, hook: str, function: Callable[[pl.Trainer], Any]) -> None:
        setattr(self, hook, lambda trainer, *_: function(trainer))


def refusal(hook: str, function: Callable[[Any], Any], *callbacks: Any, **options: Any) -> str:
    with pytest.raises(ValueError, match=r"^capture\(|^restore\(") as raised:
        fit(everything()[0], *callbacks, Calls(hook, function), **options)
    return str(raised.value)


@pytest.mark.parametrize(
    "hook",
    ["on_train_start", "on_train_batch_start", "on_before_optimizer_step", "on_validation_end"],
)
def test_elsewhere_a_state_is_not_whole(hook: str) -> None:
    told = refusal(hook, capture, num_sanity_val_steps=0)
    assert told.startswith(f"capture(hook='{hook}'): a state is whole at the end of a training")
    assert "parameter.grad = None" in told


AT_END = "on_train_batch_end"


def test_without_exact_resume_nothing_can_go_back() -> None:
    told = refusal(AT_END, capture, callbacks=[Calls(AT_END, capture)])
    assert "without ExactResume data and randomness do not follow the position. Add" in told


def test_weights_that_lightning_averages_cannot_go_back() -> None:
    told = refusal(AT_END, capture, StochasticWeightAveraging(1e-3, 0.9))
    assert told.startswith("capture(callbacks='StochasticWeightAveraging'): it takes up")


def test_a_state_of_another_fit_is_refused() -> None:
    rewind = Rewinds(2, 4, times=0)
    fit(everything()[0], rewind)
    told = refusal(AT_END, lambda trainer: restore(trainer, rewind.state))
    assert told.startswith("restore(state='position 2'): it is of another fit.")


def test_an_earlier_epoch_of_other_loaders_is_refused() -> None:
    every = {"reload_dataloaders_every_n_epochs": 1}
    with pytest.raises(ValueError, match=r"epochs=1\): the loaders may be others than those of"):
        fit(everything()[0], Rewinds(2, 8, times=1), **every)
    rewinds(everything, 2, 4, **every)


class Sharded(torch.optim.SGD):
    def consolidate_state_dict(self) -> None:
        """Send it all to rank 0."""


def test_ranks_that_hold_parts_of_the_optimizer_are_refused() -> None:
    class Theirs(Plain):
        def configure_optimizers(self) -> Any:
            return Sharded(self.parameters(), lr=0.1)

    def on(rank: int) -> str:
        ranks = {"devices": 2, "strategy": "ddp", "plugins": ForkedRanks(rank, 2)}
        with pytest.raises(ValueError, match=r"^capture\(|^restore\(") as raised:
            fit(Theirs(), Calls(AT_END, capture), **ranks)
        return str(raised.value)

    for told in run_ranks(on):
        assert told.startswith("capture(optimizer='Sharded'): each rank holds a part of its state")


def test_ranks_that_hold_parts_of_the_model_are_refused() -> None:
    """A state is whole on each rank, or the strategy lets each take its own part."""
    trainer: Any = SimpleNamespace(
        callbacks=[], optimizers=[], strategy=FSDPStrategy(), world_size=2
    )
    with pytest.raises(ValueError, match=r"^x\(strategy='FSDPStrategy'\): its ranks hold parts"):
        check_goes_back(trainer, "x")
    trainer.strategy = PipelineStrategy()
    check_goes_back(trainer, "x")
    trainer.strategy = ZeROInfinityStrategy()
    check_goes_back(trainer, "x")


def test_a_communication_hook_with_a_state_is_refused() -> None:
    strategy = DDPStrategy(ddp_comm_state=object())
    trainer = pl.Trainer(accelerator="cpu", devices=1, strategy=strategy, logger=False)
    with pytest.raises(ValueError, match=r"^x\(strategy='DDPStrategy'\): the state of its comm"):
        check_goes_back(trainer, "x")
