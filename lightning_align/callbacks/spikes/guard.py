"""Loss spikes: seen before the update, and kept out of the weights.

Lightning calls ``on_before_optimizer_step`` of callbacks before the module's own, where our modules
divide their gradient sums: a callback sees undivided ones there, and what a step returns comes
behind the update. Between that hook and the update there is one more, of the module, which
Lightning calls whether or not there is anything to clip: ``configure_gradient_clipping``. While a
run fits, the guard stands in its place, judges the step, and calls it unless the step is left out.
"""

import copy
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_align._compat.lightning_trainer import is_accumulating, leave_step_to_no_average
from lightning_align._declared import declared
from lightning_align._errors import argument_error
from lightning_align.callbacks.spikes import checks
from lightning_align.callbacks.spikes.evidence import SpikeEvidence
from lightning_align.callbacks.spikes.ladder import ACCEPT, NEAR_STEPS, Ladder, rungs_of
from lightning_align.callbacks.spikes.measures import Measured, Overflows, WindowLosses
from lightning_align.callbacks.spikes.rewind import SpikeRewind
from lightning_align.optimizers.clipping import ZClip, clip_units_, units
from lightning_align.reports.spikes import SpikeReport, describe
from lightning_align.run.accumulation import drop_gradients
from lightning_align.run.callbacks import bring, callbacks_of
from lightning_align.run.exact_resume import ExactResume
from lightning_align.run.position import batches_consumed
from lightning_align.run.protocols import PlansChanges, forget_window
from lightning_align.run.replicas import of_every_rank, scale_gradients
from lightning_align.run.skip_list import follow_skip_list
from lightning_align.run.skipping import stream_position
from lightning_align.spike_incidents import Incident
from lightning_align.stability import SpikeDetector, SpikeVerdict

_HOOK = "configure_gradient_clipping"
_LEAVES_OUT = ("skip", "rewind", "stop")  # actions by which a step is not taken
_WINDOW_KEY = "lightning_align.spike_guard"  # of a checkpoint in mid-accumulation


@declared
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
        if agc is not None and not 0 < agc < math.inf:
            raise argument_error("SpikeGuard", "agc", agc, "must be a number above 0, say 0.01")
        self.agc, self.skip_list = agc, skip_list
        self.detector = detector or SpikeDetector()
        self.ladder = Ladder(rungs, max_rewinds, max_consecutive_skips)
        self.verdict: SpikeVerdict | None = None
        rewind = SpikeRewind(
            rewind_steps,
            snapshot_every_n_steps,
            skip_batches,
            lr_factor=lr_factor,
            lr_steps=lr_steps,
            moments=moments,
        )
        self._rewind = rewind if "rewind" in rungs else None
        self.evidence = SpikeEvidence(preview_tokens)
        self.report = SpikeReport(report_dir)
        self._losses = WindowLosses()
        self._overflows = Overflows()
        self._limits = ZClip()
        self._units: dict[nn.Parameter, tuple[int, ...]] = {}
        self._planning: list[PlansChanges] = []
        self._hidden: dict[str, Any] | None = None  # of the module's own attributes, in a fit
        self._window_start = 0  # number of the first batch of the open window
        self._action: str | None = None  # that the latest step got
        self._is_judged = False  # whether this batch has closed its window
        self._as_built = copy.deepcopy(self.state_dict())

    # Before training

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        checks.check_run(trainer, pl_module, SpikeGuard)
        if self.agc is not None:
            checks.check_agc(trainer)
        if self._rewind is not None:
            self._rewind.setup(trainer, pl_module, stage)
        if self.skip_list:
            bring(ExactResume, trainer, pl_module, stage)
        if trainer.global_step == 0:  # a new run; a resumed one loads its state after setup
            self.load_state_dict(copy.deepcopy(self._as_built))
            self._losses = WindowLosses()
            self.report.begin()

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        checks.check_optimizers(trainer)
        checks.check_parts(trainer, pl_module)
        self._planning = [each for each in callbacks_of(trainer) if isinstance(each, PlansChanges)]
        self._losses.begin(pl_module)
        if self.agc is not None:
            self._units = units(pl_module)
        # An attribute of the instance: the class, and so every other module of it, stays.
        theirs = getattr(pl_module, _HOOK)
        self._hidden = {name: each for name, each in vars(pl_module).items() if name == _HOOK}
        vars(pl_module)[_HOOK] = partial(self._before_clipping, pl_module, theirs)
        self.report.follow(trainer)
        self.evidence.set_up(trainer, pl_module, self.report.is_read)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.skip_list:
            follow_skip_list(trainer, self.skip_list, "SpikeGuard")
        if self._rewind is not None:
            self._rewind.start(trainer)

    # A window

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if not self._losses.losses:
            self._window_start = batches_consumed(trainer)
        self.evidence.begin_batch(batch, stream_position(trainer))

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
        pl_module: LightningModule,
        theirs: Callable[..., None],
        optimizer: Optimizer,
        **clipping: Any,
    ) -> None:
        """What Lightning calls instead of the module's ``configure_gradient_clipping``."""
        trainer = pl_module.trainer
        measured = self._losses.close(trainer, pl_module)
        overflowed = measured is not None and self._overflows.is_one(trainer, measured)
        judged, self._is_judged = self._is_judged, True
        if not judged:  # some optimizers ask for the gradients of a step again, as SAM does
            self._action = None
            if measured is not None and not overflowed:
                self._action = self._judge(trainer, pl_module, measured)
        if self._action in _LEAVES_OUT:
            self._leave_out(trainer, pl_module, stop=self._action == "stop")
            return
        if measured is not None and not overflowed:
            self._clip(trainer, pl_module, measured.grad_norm, outlier=self._action == "clip")
        theirs(optimizer, **clipping)
        if self._rewind is not None:
            self._rewind.before_step(trainer)

    def _judge(
        self, trainer: Trainer, pl_module: LightningModule, measured: Measured
    ) -> str | None:
        """The action that a step gets, None for a step like others."""
        step = trainer.global_step
        self.verdict = self.detector.update(step, *measured)
        self.evidence.before_step(trainer.optimizers[0], self.verdict)
        self.report.note(step, *measured)
        if not self.verdict.is_spike:
            self.ladder.calm()
            return None
        near = NEAR_STEPS * trainer.accumulate_grad_batches
        position = batches_consumed(trainer)  # of those trained: a rewind does not lead elsewhere
        shortens = self._limits.limit(measured.grad_norm) < measured.grad_norm
        useless = [] if shortens and measured.is_finite else ["clip"]
        if self._rewind is not None and not self._rewind.reaches(trainer):
            useless.append("rewind")
        action = self.ladder.climb(position, near, is_finite=measured.is_finite, useless=useless)
        if action == ACCEPT:
            rank_zero_warn(
                f"SpikeGuard: {self.ladder.max_consecutive_skips} steps in a row were skipped. From"
                f" step {step} on, a loss of {measured.loss:.4g} and a gradient norm of"
                f" {measured.grad_norm:.4g} count as normal."
            )
            self.detector.accept_level()
            return None
        epoch, window = trainer.current_epoch, self.evidence.window
        incident = Incident.of(self.verdict, action=action, epoch=epoch, **window)
        if action == "skip" and self.ladder.rung == "rewind":
            steps = "of this fit is old enough yet" if trainer.ckpt_path else "is old enough yet"
            incident.notes.append(
                f"No snapshot {steps}: the step was skipped in place of a rewind."
            )
            rank_zero_warn(f"SpikeGuard: step {step}: {incident.notes[-1]}")
        self.evidence.explain(trainer, pl_module, incident)  # while gradients are there
        rank_zero_info(f"SpikeGuard: {describe(incident)}")
        self.report.add(trainer, incident)
        return action

    def _leave_out(self, trainer: Trainer, pl_module: LightningModule, *, stop: bool) -> None:
        """Let the optimizer's step move nothing, and nobody count its window."""
        drop_gradients(trainer, pl_module)
        forget_window([pl_module, *callbacks_of(trainer)])
        leave_step_to_no_average(trainer)
        trainer.should_stop = trainer.should_stop or stop

    def _clip(
        self, trainer: Trainer, pl_module: LightningModule, norm: float, *, outlier: bool
    ) -> None:
        """Shorten an outlier as a whole, and the gradients of units at every step."""
        limit = self._limits.update(norm)
        if outlier:
            scale_gradients(trainer, pl_module, torch.tensor(limit / norm, device=pl_module.device))
        if self.agc is not None:
            clip_units_(self._units.items(), self.agc)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if is_accumulating(trainer):
            return
        self._is_judged = False
        action, self._action = self._action, None
        if action == "rewind" and self._rewind is not None:
            self._go_back(trainer, pl_module, self._rewind)
            return
        again = self.evidence.after_step(trainer, pl_module, taken=action not in _LEAVES_OUT)
        if again is not None:
            self.report.update(trainer, again)
        if self._rewind is not None:
            self._rewind.after_batch(trainer)

    def _go_back(self, trainer: Trainer, pl_module: LightningModule, rewind: SpikeRewind) -> None:
        """Rewind the run; its guard stays where it is on the ladder, and in its report."""
        climbed = self.ladder.state_dict()
        done = rewind.rewind(trainer)
        self.ladder.load_state_dict(climbed)
        first, end = done.left_out
        rank_zero_info(
            f"SpikeGuard: back from step {done.from_step} to step {done.to_step}; batches {first}"
            f" to {end - 1} of the run are left out."
        )
        incident = self.report.incidents[-1]
        incident.rewound_to, incident.skipped = first, [[first, end]]
        incident.notes += done.checkpoints.notes
        if self.ladder.rewinds > 1:
            incident.notes.append(
                f"Rewind {self.ladder.rewinds} at this place: other batches led to it as well, so"
                " they are hardly the cause."
            )
            rank_zero_warn(
                f"SpikeGuard: step {incident.step}: {incident.notes[-1]} Look at the learning rate"
                " there, or set lr_factor."
            )
        again = self.evidence.rewound(trainer, pl_module, incident)
        self.report.update(trainer, again or incident)

    # The end

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.report.end(trainer)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._stop(trainer, pl_module)

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._stop(trainer, pl_module)

    def _stop(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._hidden is not None:
            vars(pl_module).pop(_HOOK, None)
            vars(pl_module).update(self._hidden)
            self._hidden = None
        if self._rewind is not None:
            self._rewind.stop(trainer)

    # Resuming

    @override
    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # A module that measures has its sums in the checkpoint; ranks have losses of their own.
        if is_accumulating(trainer) and not self._losses.told:
            checkpoint[_WINDOW_KEY] = of_every_rank(trainer, self._losses.plain())

    @override
    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        windows = checkpoint.get(_WINDOW_KEY, [])
        own = windows[trainer.global_rank] if len(windows) == trainer.world_size else []
        self._losses.restore(own)

    @override
    def state_dict(self) -> dict[str, Any]:
        state = {
            "detector": self.detector.state_dict(),
            "ladder": self.ladder.state_dict(),
            "limits": self._limits.state_dict(),
            "overflows": self._overflows.in_a_row,
            "window_start": self._window_start,
        }
        return state if self._rewind is None else {**state, "rewind": self._rewind.state_dict()}

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.detector.load_state_dict(state_dict["detector"])
        self.ladder.load_state_dict(state_dict["ladder"])
        self._limits.load_state_dict(state_dict["limits"])
        self._overflows.in_a_row = state_dict["overflows"]
        self._window_start = state_dict["window_start"]
        if self._rewind is not None and "rewind" in state_dict:
            self._rewind.load_state_dict(state_dict["rewind"])
