"""Loss spikes: seen before the update, and kept out of the weights.

Lightning calls ``on_before_optimizer_step`` of callbacks before the module's own, where our modules
divide their gradient sums: a callback sees undivided ones there, and what a step returns comes
behind the update. Between that hook and the update there is one more, of the module, which
Lightning calls whether or not there is anything to clip: ``configure_gradient_clipping``. While a
run fits, the guard stands in its place, judges the step, and calls it unless the step is left out.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_align._compat.lightning_trainer import is_accumulating
from lightning_align.callbacks import spike_checks
from lightning_align.callbacks.spike_evidence import SpikeEvidence
from lightning_align.callbacks.spike_ladder import ACCEPT, NEAR_STEPS, Ladder, rungs_of
from lightning_align.callbacks.spike_measures import Measured, WindowLosses
from lightning_align.reports.spikes import SpikeReport, describe
from lightning_align.run.accumulation import drop_gradients
from lightning_align.run.callbacks import callbacks_of
from lightning_align.run.position import batches_consumed
from lightning_align.run.protocols import PlansChanges, forget_window
from lightning_align.spike_incidents import Incident
from lightning_align.stability import SpikeDetector, SpikeVerdict

_HOOK = "configure_gradient_clipping"


class SpikeGuard(Callback):
    """Watch loss and gradient norm, and decide before an update whether it would hurt.

    Each optimizer step is judged by ``detector`` when its gradients are whole and before they are
    clipped. A spike gets an action, and repeated alarms at one place get the next one of several:
    ``"log"`` tells of it; ``"clip"`` shortens the gradient (ZClip, arXiv:2504.02507); ``"skip"``
    leaves the step out; ``"rewind"`` goes back and leaves out the batches that led there;
    ``"stop"`` ends training as if by ``trainer.should_stop``.

    Args:
        action: What is done, or a list from the mildest to the strongest.
        detector: Tells spikes from noise; None takes SpikeDetector().
        rewind_steps: Optimizer steps that a rewind goes back, at least.
        skip_batches: Batches that a rewind leaves out behind the one of the alarm.
        snapshot_every_n_steps: Optimizer steps between the snapshots that a rewind goes back to.
        max_rewinds: Rewinds at one place before training is stopped.
        max_consecutive_skips: Steps skipped in a row after which the level counts as a new one.
        lr_factor: What the learning rate is multiplied by after a rewind; None leaves it.
        lr_steps: Optimizer steps for which ``lr_factor`` holds.
        moments: What becomes of the optimizer's moments in a rewind, keep or reset.
        agc: Largest ratio of a unit's gradient norm to its weight norm, at every step; None for no
            such clipping.
        report_dir: Folder of the reports, relative to ``trainer.default_root_dir``; None writes
            none.
        preview_tokens: Tokens of each sample's text in a report; 0 for none.
        skip_list: File of batches to leave out, as ``lightning-align spikes`` writes it.

    Attributes:
        verdict: Of the latest step.

    Raises:
        ValueError: If an argument is out of its range, or before training, if the module optimizes
            manually or the strategy does not let gradients be judged.

    Example:
        >>> guard = SpikeGuard(action=["clip", "skip", "stop"])

    Note: the step of a skipped window counts for ``global_step`` and for schedules by step, its
    tokens for nothing.
    """

    def __init__(
        self,
        action: str | list[str] = "skip",
        detector: SpikeDetector | None = None,
        rewind_steps: int = 100,
        skip_batches: int = 200,
        snapshot_every_n_steps: int = 100,
        max_rewinds: int = 3,
        max_consecutive_skips: int = 10,
        lr_factor: float | None = None,
        lr_steps: int = 100,
        moments: Literal["keep", "reset"] = "keep",
        agc: float | None = None,
        report_dir: str | None = None,
        preview_tokens: int = 64,
        skip_list: str | None = None,
    ) -> None:
        rungs = rungs_of(action)
        for argument, value in {
            "rewind": "rewind" in rungs,
            "agc": agc,
            "skip_list": skip_list,
        }.items():
            spike_checks.refuse_unbuilt(argument, value)
        self.detector = detector or SpikeDetector()
        self.ladder = Ladder(rungs, max_rewinds, max_consecutive_skips)
        self.verdict: SpikeVerdict | None = None
        self.rewinding = (rewind_steps, skip_batches, snapshot_every_n_steps)
        self.afterwards = (lr_factor, lr_steps, moments)
        self.evidence = SpikeEvidence(preview_tokens)
        self.report = SpikeReport(report_dir)
        self._losses = WindowLosses()
        self._planning: list[PlansChanges] = []
        self._window_start = 0  # number of the first batch of the open window
        self._was_skipped = False

    # Before training

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        spike_checks.check_run(trainer, pl_module, SpikeGuard)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        spike_checks.check_optimizers(trainer)
        self._planning = [each for each in callbacks_of(trainer) if isinstance(each, PlansChanges)]
        # An attribute of the instance: the class, and so every other module of it, stays.
        theirs = getattr(pl_module, _HOOK)
        vars(pl_module)[_HOOK] = partial(self._before_clipping, trainer, pl_module, theirs)
        by_layer = self.report.is_read(trainer)
        self.evidence.set_up(trainer, pl_module, by_layer)
        # Seam: the rewind is set up here.

    # A window

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if not self._losses.losses:
            self._window_start = batches_consumed(trainer)
        self.evidence.begin_batch(batch, batches_consumed(trainer))

    @override
    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        self.evidence.add_loss(pl_module, self._losses.add(trainer, loss))

    @override
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Changes that were planned with a batch of this window are no spikes."""
        for position in range(self._window_start, batches_consumed(trainer) + 1):
            for each in self._planning:
                if reason := each.planned_change(position):
                    self.detector.planned_change(reason)

    def _before_clipping(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        theirs: Callable[..., None],
        optimizer: Optimizer,
        **clipping: Any,
    ) -> None:
        """What Lightning calls instead of the module's ``configure_gradient_clipping``."""
        measured = self._losses.close(trainer, pl_module)
        if measured is None or self._act(trainer, pl_module, measured) in ("log", "clip"):
            theirs(optimizer, **clipping)

    def _act(self, trainer: Trainer, pl_module: LightningModule, measured: Measured) -> str:
        """Judge the step, do what its verdict asks for, and say what that is."""
        self.evidence.before_step(trainer.global_step, trainer.optimizers[0], *measured)
        self.report.note(trainer.global_step, *measured)
        self.verdict = self.detector.update(trainer.global_step, *measured)
        if not self.verdict.is_spike:
            self.ladder.calm()
            return "log"
        near = NEAR_STEPS * trainer.accumulate_grad_batches
        position = batches_consumed(trainer)  # seam: of the stream
        action = self.ladder.climb(position, near, is_finite=measured.is_finite)
        if action == ACCEPT:
            rank_zero_warn(
                f"SpikeGuard: {self.ladder.max_consecutive_skips} steps in a row were skipped, so"
                f" from step {trainer.global_step} on a loss of {measured.loss:.4g} and a gradient"
                f" norm of {measured.grad_norm:.4g} count as normal."
            )
            self.detector.accept_level()
            return "log"
        incident = Incident.of(
            self.verdict, action=action, epoch=trainer.current_epoch, **self.evidence.window
        )
        self.evidence.explain(trainer, pl_module, incident)
        rank_zero_info(f"SpikeGuard: {describe(incident)}")
        self.report.add(trainer, incident)
        if action in ("skip", "rewind", "stop"):
            drop_gradients(trainer, pl_module)
            forget_window([pl_module, *callbacks_of(trainer)])
            self._was_skipped = True
        if action == "stop":
            trainer.should_stop = True
        return action

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if is_accumulating(trainer):
            return
        again = self.evidence.after_step(trainer, pl_module, taken=not self._was_skipped)
        if again is not None:
            self.report.update(trainer, again)
        self._was_skipped = False
        # Seam: the rewind, or its snapshot.

    # The end

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.report.end(trainer)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        vars(pl_module).pop(_HOOK, None)

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        vars(pl_module).pop(_HOOK, None)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"detector": self.detector.state_dict(), "ladder": self.ladder.state_dict()}

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.detector.load_state_dict(state_dict["detector"])
        self.ladder.load_state_dict(state_dict["ladder"])
