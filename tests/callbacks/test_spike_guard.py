"""SpikeGuard: where the verdict falls, what each action leaves, and what is refused."""

import copy
import math
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lightning_align import LISA, SpikeGuard, TokenSchedule
from tests.helpers.spiky import AlarmAt, Regression, batches
from tests.modules.test_pretrain import fit, rows, sgd_module, weights


class Watch(pl.Callback):
    """Weights, optimizer state and what was logged, behind each batch."""

    def __init__(self) -> None:
        self.weights: list[torch.Tensor] = []
        self.states: list[Any] = []
        self.logged: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.weights.append(weights(pl_module))
        self.states.append(copy.deepcopy(trainer.optimizers[0].state_dict()))
        metrics = trainer.logged_metrics | trainer.callback_metrics
        self.logged.append({name: float(value) for name, value in metrics.items()})


def guarded(
    module: pl.LightningModule, guard: SpikeGuard, data: Any, **options: Any
) -> tuple[Watch, Any]:
    watch = Watch()
    return watch, fit(module, data, callbacks=[guard, watch, *options.pop("more", [])], **options)


def test_the_verdict_sees_what_the_module_logs_before_the_update() -> None:
    """Of unequal batches in windows of two: the mean over tokens, and the norm of its gradient."""
    detector = AlarmAt()
    watch, _ = guarded(
        sgd_module(),
        SpikeGuard(detector=detector),
        [rows(0), rows(1, 2, 3), rows(4, 5), rows(6)],
        accumulate_grad_batches=2,
    )
    logged = [watch.logged[number] for number in (1, 3)]
    assert detector.seen == [
        (step, values["train_loss"], values["grad_norm"]) for step, values in enumerate(logged)
    ]


def test_of_a_foreign_module_loss_and_norm_are_those_of_the_window() -> None:
    detector, data = AlarmAt(), batches(4)
    module = Regression()
    theirs = copy.deepcopy(module)
    loss_of_both = sum(theirs.training_step(batch, 0) for batch in data[:2]) / 2
    loss_of_both.backward()
    guarded(module, SpikeGuard(detector=detector), data, accumulate_grad_batches=2)
    norm = torch.nn.utils.get_total_norm([p.grad for p in theirs.parameters()])
    step, loss, grad_norm = detector.seen[0]
    assert step == 0
    # Two means of two numbers, in fp32.
    assert loss == pytest.approx(loss_of_both.item(), rel=1e-6)
    assert grad_norm == pytest.approx(float(norm), rel=1e-6)


@pytest.mark.parametrize("module", [Regression, sgd_module], ids=["hand-written", "ours"])
def test_a_skipped_step_leaves_weights_and_optimizer_as_they_were(module: Any) -> None:
    data = batches(6) if module is Regression else [rows(i, i + 1) for i in range(6)]
    watch, trainer = guarded(module(), SpikeGuard(detector=AlarmAt(3)), data)
    assert torch.equal(watch.weights[3], watch.weights[2])
    assert str(watch.states[3]) == str(watch.states[2])
    assert not torch.equal(watch.weights[4], watch.weights[3])
    assert trainer.global_step == 6


def test_stop_leaves_the_step_out_and_ends_training() -> None:
    watch, trainer = guarded(
        Regression(), SpikeGuard(action="stop", detector=AlarmAt(3)), batches(9)
    )
    assert trainer.should_stop
    assert len(watch.weights) == 4
    assert torch.equal(watch.weights[3], watch.weights[2])


def test_a_planted_spike_and_nan_are_found_with_the_defaults_and_kept_out() -> None:
    data = batches(60, at40=1e4, at50=math.nan)
    guard = SpikeGuard()
    watch, _ = guarded(Regression(), guard, data)
    skipped = [
        number
        for number in range(1, 60)
        if torch.equal(watch.weights[number], watch.weights[number - 1])
    ]
    assert skipped == [40, 50]


def test_tokens_of_a_skipped_window_are_counted_by_nobody() -> None:
    data = [rows(i, i + 1) for i in range(5)]
    schedule = TokenSchedule(max_tokens=10_000)
    watch, trainer = guarded(
        sgd_module(), SpikeGuard(detector=AlarmAt(2)), data, more=[schedule], logger=True
    )
    learned = [int((batch["labels"][:, 1:] != -100).sum()) for batch in data]
    expected = sum(learned) - learned[2]
    assert schedule.tokens_seen == trainer.lightning_module.tokens_seen == expected
    assert watch.logged[2]["tokens_seen"] == watch.logged[1]["tokens_seen"] == sum(learned[:2])
    assert watch.logged[2]["train_loss"] > 0


def test_a_change_that_lisa_plans_is_told_to_the_detector() -> None:
    detector = AlarmAt()
    lisa = LISA(1, interval_steps=2, filename=None)
    guarded(
        sgd_module(),
        SpikeGuard(detector=detector),
        [rows(i) for i in range(12)],
        more=[lisa],
        accumulate_grad_batches=2,
    )
    assert [step for step, _ in lisa.history] == [0, 2, 4]
    assert len(detector.told) == 2  # the first draw changes nothing


def test_the_modules_hook_is_its_own_again_behind_the_run() -> None:
    class Own(Regression):
        clipped = 0

        def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
            self.clipped += 1
            super().configure_gradient_clipping(*args, **kwargs)

    module = Own()
    guarded(module, SpikeGuard(detector=AlarmAt(1)), batches(4))
    assert module.clipped == 3  # of a step that is left out there is nothing to clip
    assert "configure_gradient_clipping" not in vars(module)


class Manual(Regression):
    automatic_optimization = False


class Another(SpikeGuard):
    """Of another class, since Lightning refuses two of one."""


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fit(Manual(), batches(2), callbacks=[SpikeGuard()]), "optimizes manually"),
        (
            lambda: fit(Regression(), batches(2), callbacks=[SpikeGuard(), Another()]),
            "2 of them",
        ),
    ],
    ids=["manual", "two guards"],
)
def test_what_is_refused_before_training(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
