"""SpikeGuard: where the verdict falls, what each action leaves, and what is refused."""

import contextlib
import copy
import math
import pickle
import warnings
from functools import partial
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.plugins import MixedPrecision

from lightning_align import (
    LISA,
    DPOModule,
    ExactResume,
    Muon,
    OptimizerSwap,
    PretrainModule,
    SpikeGuard,
    StableAdamW,
    TokenSchedule,
)
from lightning_align.cli.spikes import spikes
from lightning_align.optimizers.clipping import ZClip, clip_units_, units
from tests.helpers.lisa import OPTIMIZERS
from tests.helpers.spiky import AlarmAt, Regression, batches
from tests.helpers.tiny_models import TINY_MODELS
from tests.laws.test_callbacks import same
from tests.modules.test_dpo import pairs
from tests.modules.test_pretrain import fit, llama, rows, sgd_module, weights


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


@pytest.mark.parametrize(
    "measured", [5, lambda self: 7.0, (1.0, 2.0)], ids=["number", "method", "floats"]
)
def test_a_foreign_measured_step_that_means_something_else_is_left_alone(measured: Any) -> None:
    class Own(Regression):
        measured_step = measured

    ours, theirs = AlarmAt(), AlarmAt()
    guarded(Own(), SpikeGuard(detector=ours), batches(3))
    guarded(Regression(), SpikeGuard(detector=theirs), batches(3))
    assert ours.seen == theirs.seen


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
    data = batches(90, at70=1e4, at80=math.nan)
    guard = SpikeGuard()
    watch, _ = guarded(Regression(), guard, data)
    skipped = [
        number
        for number in range(1, 90)
        if torch.equal(watch.weights[number], watch.weights[number - 1])
    ]
    assert skipped == [70, 80]


def test_tokens_of_a_skipped_window_are_counted_by_nobody() -> None:
    data = [rows(i, i + 1) for i in range(5)]
    schedule = TokenSchedule(max_tokens=10_000)
    watch, trainer = guarded(sgd_module(), SpikeGuard(detector=AlarmAt(2)), data, more=[schedule])
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


def test_a_hook_that_was_put_into_the_module_itself_is_there_again() -> None:
    """Behind a fit, and behind a validation, which a guard has nothing to do with."""
    module, seen = Regression(), list[int]()
    vars(module)["configure_gradient_clipping"] = hook = lambda *_, **__: seen.append(1)
    _, trainer = guarded(module, SpikeGuard(detector=AlarmAt(1)), batches(4))
    assert vars(module)["configure_gradient_clipping"] is hook
    assert len(seen) == 3
    with contextlib.suppress(Exception):
        trainer.validate(module, batches(1), verbose=False)
    assert vars(module)["configure_gradient_clipping"] is hook


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


# Clipping


class LastGradients(pl.Callback):
    """Gradients of each step as the optimizer gets them."""

    def __init__(self) -> None:
        self.norms: list[float] = []
        self.gradients: list[list[torch.Tensor]] = []

    def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        if gradients:
            self.norms.append(float(torch.nn.utils.get_total_norm(gradients)))
            self.gradients.append([gradient.clone() for gradient in gradients])


def test_clip_shortens_an_outlier_to_zclips_limit() -> None:
    """Behind ZClip's 25 steps; what the optimizer gets has the norm that the paper's rule says."""
    last, detector = LastGradients(), AlarmAt(35)
    guarded(
        Regression(lr=1e-4),
        SpikeGuard("clip", detector),
        batches(40, at35=1e3),
        more=[last],
    )
    norms = [norm for _, _, norm in detector.seen]
    limits = ZClip()
    expected = [limits.update(norm) for norm in norms]  # type: ignore[arg-type]
    assert expected[35] < 0.01 * norms[35]  # type: ignore[operator]
    # A product in fp32, and a norm of it.
    assert last.norms[35] == pytest.approx(expected[35], rel=1e-5)
    assert last.norms[:35] == pytest.approx(norms[:35], rel=1e-6)


@pytest.mark.parametrize("action", ["clip", ["clip", "skip"]], ids=str)
def test_what_cannot_be_clipped_is_skipped_or_where_clipping_is_all_taken(action: Any) -> None:
    """What is not a number is skipped always; a loss whose gradient is no outlier is taken where
    the user leaves no step out."""
    data, guard = batches(80, at30=math.nan), SpikeGuard(action, AlarmAt(30, 70))
    watch, _ = guarded(Regression(), guard, data)
    assert torch.equal(watch.weights[30], watch.weights[29])
    skips = action != "clip"
    assert torch.equal(watch.weights[70], watch.weights[69]) == skips
    assert guard.report.incidents[1].action == ("skip" if skips else "log")


def test_agc_clips_each_unit_before_lightning_clips() -> None:
    last, theirs = LastGradients(), LastGradients()
    module = Regression(lr=0.0)
    guarded(module, SpikeGuard(agc=0.01), batches(3), more=[last], gradient_clip_val=1e9)
    guarded(Regression(lr=0.0), SpikeGuard(), batches(3), more=[theirs])
    parameters = list(module.parameters())
    for ours, unclipped in zip(last.gradients, theirs.gradients, strict=True):
        for parameter, gradient in zip(parameters, unclipped, strict=True):
            parameter.grad = gradient.clone()
        clip_units_(units(module).items(), 0.01)
        assert all(
            torch.equal(gradient, parameter.grad)  # type: ignore[arg-type]
            for parameter, gradient in zip(parameters, ours, strict=True)
        )
    assert any(
        not torch.equal(a, b) for a, b in zip(last.gradients[0], theirs.gradients[0], strict=True)
    )


# Ladders


def test_alarms_at_one_place_climb_and_a_level_that_stays_is_accepted() -> None:
    guard = SpikeGuard(["log", "skip"], AlarmAt(*range(5, 30)), max_consecutive_skips=4)
    with pytest.warns(UserWarning, match="4 steps in a row were skipped. From step 10 on"):
        watch, _ = guarded(Regression(), guard, batches(12))
    moved = [
        not torch.equal(watch.weights[number], watch.weights[number - 1]) for number in range(1, 12)
    ]
    assert moved == [True] * 5 + [False] * 4 + [True] + [False]


def test_what_is_not_a_number_for_too_long_ends_training() -> None:
    data = batches(30, **{f"at{number}": math.nan for number in range(5, 30)})
    watch, trainer = guarded(Regression(), SpikeGuard(max_consecutive_skips=3), data)
    assert len(watch.weights) == 9  # three skipped, and one at which it stops
    assert trainer.should_stop
    assert weights(trainer.lightning_module).isfinite().all()


# Steps that are none


class Pausing(Regression):
    """Returns no loss for one batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None if batch_idx == 2 else super().training_step(batch, batch_idx)


class PausingPretrain(PretrainModule):
    """The same of ours."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None if batch_idx == 2 else super().training_step(batch, batch_idx)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("kind", [Pausing, PausingPretrain])
def test_a_batch_without_a_loss_is_passed_over(kind: Any, accumulate: int) -> None:
    detector = AlarmAt()
    module = kind() if kind is Pausing else kind(llama())
    data = batches(6) if kind is Pausing else [rows(i, i + 1) for i in range(6)]
    guarded(module, SpikeGuard(detector=detector), data, accumulate_grad_batches=accumulate)
    steps = [step for step, _, _ in detector.seen]
    assert steps == ([0, 1, 3, 4, 5] if accumulate == 1 else [0, 1, 2])
    assert all(math.isfinite(loss) for _, loss, _ in detector.seen)


# Loss scaling


class Scaled(MixedPrecision):
    """fp16's scaler on a CPU, around arithmetic in fp32."""

    def __init__(self) -> None:
        super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu"))

    def autocast_context_manager(self) -> Any:
        return contextlib.nullcontext()


class Overflowing(Regression):
    """Gradients overflow while the scale is above a limit, and from a step on always."""

    def __init__(self, limit: float, always_from: int = 10**9) -> None:
        super().__init__()
        self.limit, self.always_from = limit, always_from
        self.net[0].weight.register_hook(self.overflow)

    def overflow(self, gradient: torch.Tensor) -> torch.Tensor:
        scale = self.trainer.precision_plugin.scaler.get_scale()
        overflows = scale > self.limit or self.trainer.global_step >= self.always_from
        return gradient * math.inf if overflows else gradient


def test_overflows_of_a_scaler_are_its_own_and_losses_are_unscaled() -> None:
    detector, plain = AlarmAt(), AlarmAt()
    data = batches(8)
    guarded(Overflowing(2.0**14), SpikeGuard(detector=detector), data, plugins=[Scaled()])
    guarded(Regression(), SpikeGuard(detector=plain), data[2:])
    assert [step for step, _, _ in detector.seen] == [2, 3, 4, 5, 6, 7]
    # The scale is a power of two, and no number is near the ends of fp32.
    assert [loss for _, loss, _ in detector.seen] == [loss for _, loss, _ in plain.seen]
    assert [norm for _, _, norm in detector.seen] == [norm for _, _, norm in plain.seen]


def test_a_row_of_overflows_is_an_incident() -> None:
    guard = SpikeGuard(max_consecutive_skips=2)
    watch, trainer = guarded(
        Overflowing(math.inf, always_from=3), guard, batches(40), plugins=[Scaled()]
    )
    # Batches 3 to 18 are left to the scaler; 19 and 20 are skipped, and 21 ends training.
    assert guard.verdict is not None
    assert guard.verdict.reason == "gradient norm is not finite"
    assert len(watch.weights) == 22
    assert trainer.should_stop


# Resuming


class SaveAt(pl.Callback):
    """Saves behind a batch, in the middle of a window."""

    def __init__(self, path: Any, batch: int) -> None:
        self.path, self.batch = path, batch

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.fit_loop.epoch_loop.batch_idx == self.batch:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("batch", [6, 7])
def test_a_resumed_guard_sees_what_one_that_went_on_sees(batch: int, tmp_path: Any) -> None:
    path, data = tmp_path / "some.ckpt", batches(16)
    whole, resumed = AlarmAt(5), AlarmAt(5)
    options = {"accumulate_grad_batches": 2, "more": [ExactResume()]}
    more = [SaveAt(path, batch), ExactResume()]
    ours, _ = guarded(
        Regression(), guard := SpikeGuard(detector=whole), data, **{**options, "more": more}
    )
    theirs, _ = guarded(
        Regression(), again := SpikeGuard(detector=resumed), data, ckpt_path=path, **options
    )
    assert torch.equal(ours.weights[-1], theirs.weights[-1])
    first = (batch + 1) // 2
    assert resumed.seen == whole.seen[first:]
    assert again.state_dict() == guard.state_dict()


def test_a_run_is_guarded_that_is_resumed_from_behind_its_end(tmp_path: Any) -> None:
    """A checkpoint of a module whose hook is its own again, which no longer run puts back."""
    options: dict[str, Any] = {"more": [ExactResume()], "limit_train_batches": 9}
    _, trainer = guarded(Regression(), SpikeGuard(), batches(9), **options)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    detector = AlarmAt(10)
    watch, _ = guarded(
        Regression(),
        SpikeGuard(detector=detector),
        batches(9),
        ckpt_path=tmp_path / "end.ckpt",
        max_epochs=2,
        **options,
    )
    assert [step for step, _, _ in detector.seen] == list(range(9, 18))
    assert torch.equal(watch.weights[1], watch.weights[0])


def test_all_of_a_guards_state_is_taken_up() -> None:
    guard = SpikeGuard(["skip", "rewind"])
    state = {**SpikeGuard("rewind").state_dict(), "overflows": 5, "window_start": 7}
    state["ladder"] |= {"rung": 1, "last": 9, "rewinds": 1, "rewound": 8, "skips": 2}
    state["rewind"] = {"lr_until": 12}
    guard.load_state_dict(copy.deepcopy(state))
    assert guard.state_dict() == state


def test_a_second_run_begins_anew() -> None:
    guard = SpikeGuard()
    guarded(Regression(), guard, batches(40))
    first = guard.state_dict()
    guarded(Regression(), guard, batches(40))
    assert guard.state_dict() == first


def test_a_run_after_one_that_broke_has_losses_and_incidents_of_its_own() -> None:
    class Breaks(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
            if rest[-1] == 4:  # the first batch of a window
                raise RuntimeError("told to")

    again, fresh, window = AlarmAt(1), AlarmAt(1), {"accumulate_grad_batches": 2}
    guard = SpikeGuard(detector=again)
    with pytest.raises(RuntimeError, match="told to"):
        guarded(Regression(), guard, batches(6), more=[Breaks()], **window)
    again.seen.clear()
    guarded(Regression(), guard, batches(6), **window)
    guarded(Regression(), SpikeGuard(detector=fresh), batches(6), **window)
    assert again.seen == fresh.seen
    assert len(guard.report.incidents) == 1


def test_a_module_can_be_copied_and_pickled_while_it_is_guarded() -> None:
    made: list[Any] = []

    class Copies(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            made.extend([copy.deepcopy(pl_module), pickle.loads(pickle.dumps(pl_module))])

    trained = Regression()
    guarded(trained, SpikeGuard(), batches(2), more=[Copies()])
    assert len(made) == 4
    assert all(torch.equal(weights(each), weights(trained)) for each in made[2:])


# Refused


REFUSED: dict[str, tuple[Any, str]] = {
    "LBFGS": (lambda: {"module": Regression(torch.optim.LBFGS)}, "several times in a step"),
    "fused with a scaler": (
        lambda: {
            "module": Regression(partial(torch.optim.AdamW, fused=True)),
            "plugins": [Scaled()],
        },
        "behind the verdict. Set fused=False",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_optimizers_that_are_refused(name: str) -> None:
    make, message = REFUSED[name]
    options = make()
    with pytest.raises(ValueError, match=message):
        guarded(options.pop("module"), SpikeGuard(), batches(2), **options)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_ratios_of_agc_that_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match="must be a number above 0"):
        SpikeGuard(agc=value)


# What a skipped step leaves, optimizer by optimizer


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_skipped_batch_is_as_if_it_had_not_been(name: str) -> None:
    """Momentum, weight decay, refreshes of GaLore's bases: the run without the batch, to the
    bit."""

    def trained(data: Any, *alarms: int) -> Any:
        torch.manual_seed(0)
        module = PretrainModule(llama(), optimizer=OPTIMIZERS[name])
        watch, _ = guarded(module, SpikeGuard(detector=AlarmAt(*alarms)), data)
        return watch.weights[-1], watch.states[-1]

    data = [rows(i, i + 1) for i in range(7)]
    ours, state = trained(data, 3, 4)
    theirs, expected = trained(data[:3] + data[5:])
    assert torch.equal(ours, theirs)
    assert same(state, expected)


@pytest.mark.parametrize("guard_is_last", [False, True])
def test_an_average_of_weights_is_that_of_the_run_without_the_batch(guard_is_last: bool) -> None:
    def averaged(data: Any, *alarms: int) -> torch.Tensor:
        module, guard = Regression(), SpikeGuard(detector=AlarmAt(*alarms))
        callbacks = [guard, EMAWeightAveraging(decay=0.5)]
        fit(module, data, callbacks=callbacks[::-1] if guard_is_last else callbacks)
        return weights(module)  # at the end of a run, they are the average

    data = batches(7)
    assert torch.equal(averaged(data, 3, 4), averaged(data[:3] + data[5:]))


def test_lisas_blocks_are_skipped_too_and_their_interval_goes_on() -> None:
    lisa, detector = LISA(1, interval_steps=2, filename=None), AlarmAt(3)
    watch, _ = guarded(
        sgd_module(),
        SpikeGuard(detector=detector),
        [rows(i, i + 1) for i in range(8)],
        more=[lisa],
    )
    assert [step for step, _ in lisa.history] == [0, 2, 4, 6]
    assert torch.equal(watch.weights[3], watch.weights[2])
    assert not torch.equal(watch.weights[4], watch.weights[3])


# Swapped optimizers, pairs


def test_an_optimizer_that_was_swapped_is_skipped() -> None:
    swap = OptimizerSwap(partial(Muon, lr=1e-2))
    watch, trainer = guarded(Regression(), SpikeGuard(detector=AlarmAt(2)), batches(5), more=[swap])
    assert isinstance(trainer.optimizers[0], Muon)
    assert torch.equal(watch.weights[2], watch.weights[1])
    assert not torch.equal(watch.weights[3], watch.weights[2])


def test_non_finite_gradients_are_counted_once() -> None:
    """By the guard, or, where it only logs, by the optimizer."""
    data = batches(8, at4=math.nan)
    for action, skipped in (("skip", 0), ("log", 1)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            watch, trainer = guarded(
                Regression(partial(StableAdamW)), guard := SpikeGuard(action), data
            )
        assert trainer.optimizers[0].skipped_steps == skipped
        assert torch.equal(watch.weights[4], watch.weights[3])
        assert watch.weights[-1].isfinite().all()
        assert len(guard.report.incidents) == 1


def test_pairs_are_skipped_and_their_tokens_taken_back() -> None:
    module = DPOModule(TINY_MODELS["llama"]())
    watch, _ = guarded(module, SpikeGuard(detector=AlarmAt(1)), [pairs(0), pairs(1), pairs(2)])
    assert torch.equal(watch.weights[1], watch.weights[0])
    assert watch.logged[1]["tokens_seen"] == watch.logged[0]["tokens_seen"]
    assert watch.logged[2]["tokens_seen"] == module.tokens_seen > watch.logged[0]["tokens_seen"]


class TwoPasses(torch.optim.SGD):
    """Asks for the gradients of a step twice, as SAM does."""

    def step(self, closure: Any = None) -> Any:
        closure()
        return super().step(closure)


def test_a_step_whose_gradients_are_asked_for_twice_has_one_verdict() -> None:
    detector = AlarmAt(2)
    watch, _ = guarded(Regression(TwoPasses), SpikeGuard(detector=detector), batches(5))
    assert [step for step, _, _ in detector.seen] == [0, 1, 2, 3, 4]
    assert torch.equal(watch.weights[2], watch.weights[1])
    assert not torch.equal(watch.weights[3], watch.weights[2])


def test_a_level_that_stays_is_learned_by_the_detector_too() -> None:
    """From batch 70 on all losses are a thousand times as large."""
    data = batches(110, **{f"at{number}": 1e3 for number in range(70, 110)})
    guard = SpikeGuard(max_consecutive_skips=5)
    with pytest.warns(UserWarning, match="5 steps in a row were skipped. From step 75 on"):
        watch, _ = guarded(Regression(lr=1e-4), guard, data)
    skipped = [
        number
        for number in range(1, 110)
        if torch.equal(watch.weights[number], watch.weights[number - 1])
    ]
    assert skipped == [70, 71, 72, 73, 74]


def test_what_a_run_has_skipped_is_left_out_of_a_new_one(tmp_path: Any) -> None:
    """By the list that ``spikes`` writes of its incident: the same weights, with one step less."""
    guard, data = SpikeGuard(detector=AlarmAt(3)), batches(8)
    ours, trainer = guarded(Regression(), guard, data, more=[ExactResume()])
    (incident,) = guard.report.incidents
    assert incident.stream["epoch"] == len(data)
    (tmp_path / "step_0000003.json").write_text(incident.to_json())
    spikes(tmp_path, skip_list=tmp_path / "skip.json")
    new = SpikeGuard(detector=AlarmAt(), skip_list=str(tmp_path / "skip.json"))
    theirs, _ = guarded(Regression(), new, data, max_steps=7)
    assert trainer.global_step == 8
    assert torch.equal(ours.weights[-1], theirs.weights[-1])
