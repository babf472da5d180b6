"""``RooflineMonitor``: what bounds the steps of a run, and what would help."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_align._compat import lightning_logged
from lightning_align._compat.lightning_trainer import (
    is_accumulating,
    run_steps_in,
    watch_fetches,
)
from lightning_align._compat.torch_messages import MessageClock
from lightning_align._declared import declared
from lightning_align._errors import argument_error, check_least, check_whole, finite_number
from lightning_align.callbacks import roofline_run
from lightning_align.callbacks.step_clock import StepClock
from lightning_align.figure import new_figure
from lightning_align.planner.advice import DATA, OTHER, Advice
from lightning_align.planner.analyze import report_of, tensors_there
from lightning_align.planner.balance import MachineBalance
from lightning_align.planner.module_scopes import BACKWARD, FORWARD, OPTIMIZER
from lightning_align.planner.records import Trace
from lightning_align.planner.report import StepReport
from lightning_align.planner.step_time import StepTime
from lightning_align.planner.trace import tracing
from lightning_align.reports.pictures import log_figure
from lightning_align.reports.texts import log_rows
from lightning_align.run.callbacks import callbacks_of
from lightning_align.run.position import batches_consumed
from lightning_align.run.protocols import PlansChanges

WHERE = "RooflineMonitor"
SPLIT_STEPS = 3  # before values are logged, in which a device is waited for between parts


@declared
class RooflineMonitor(Callback):
    """Say of a run's own steps what they compute and move, what bounds them, and what would help.

    Now and then a step is analysed while it trains: it takes two to three times as long and comes
    to the same bits. Of all others a few times are taken. To the loggers go, every
    ``trainer.log_every_n_steps`` steps, FLOPs utilisation without (``mfu``) and with recomputation
    (``hfu``), tokens a second of all ranks, seconds of a step and the shares of loading data,
    forward, backward, optimizer, waiting, commits and all else; and every ``every_n_steps`` a table
    of modules and a picture of the roofline. Advice with its predicted gain comes at the end.

    Args:
        every_n_steps: Optimizer steps between two analyses; the first one is of the second step.
        available_flops: Peak FLOP/s of a device for ``mfu`` and ``hfu``; default that of
            ``hardware``.
        top_k: Modules of the table and operations of the picture, those that take longest.
        hardware: Name of a maker's sheet, such as ``"h100-sxm"``, or a ``MachineBalance``; by
            default the sheet of the device, or what is measured in ten seconds before training.
        plot: Whether to draw the roofline (extra: plot).

    Attributes:
        machine: What it runs on, from the beginning of training on.
        report: Of the latest step that was analysed.
        values: What was logged last.
        advice: At the end of the run, what would help most first.

    Raises:
        ValueError: If a value is out of its range, hardware is not known, or a peak is that of
            sparse matrices.

    Example:
        >>> callback = RooflineMonitor(every_n_steps=500, hardware="h100-sxm")

    Note: manual optimization, and strategies other than those of one device, DDP,
    ``ModelParallelStrategy`` without tensor parallelism, ``PipelineStrategy`` and
    ``ZeROInfinityStrategy``, are refused at set-up. Of a compiled module
    the steps that are analysed run as they are written, and round as such.
    """

    machine: MachineBalance

    def __init__(
        self,
        every_n_steps: int = 100,
        available_flops: float | None = None,
        top_k: int = 20,
        hardware: str | MachineBalance | None = None,
        plot: bool = True,
    ) -> None:
        check_whole(WHERE, every_n_steps=every_n_steps, top_k=top_k)
        check_least(WHERE, 1, every_n_steps=every_n_steps, top_k=top_k)
        if available_flops is not None and (finite_number(available_flops) or 0) <= 0:
            rule = "must be a positive, finite number of FLOP/s"
            raise argument_error(WHERE, "available_flops", available_flops, rule)
        roofline_run.check_hardware(hardware, available_flops)
        self.every_n_steps = every_n_steps
        self.available_flops = available_flops
        self.top_k = top_k
        self.hardware = hardware
        self.plot = plot
        self.report: StepReport | None = None
        self.values: dict[str, float] = {}
        self.advice: list[Advice] = []
        self._planning: list[PlansChanges] = []
        self._trace: Trace | None = None  # of the window that is being analysed
        self._undo: list[Callable[[], None]] = []
        self._unwatch: Callable[[], None] | None = None
        self._messages: MessageClock | None = None  # of a sharded model
        self._fetches_within: str | None = None  # what the clock is at again behind a fetch
        self._windows = 0  # of this process
        self._counted = 0  # of them since values were logged, less what was analysed
        self._micro_batches = 0  # of the window that was analysed
        self._works: list[roofline_run.Work] = []  # of the ranks that ran it together
        self._analysed_at: int | None = None  # global_step before it
        self._told_at: int | None = None  # and before the latest of which there is a table
        self._is_changed = False  # since then
        self._position = 0  # of the batch that is trained

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        roofline_run.check_run(trainer, pl_module, type(self))
        if self.plot:
            new_figure(1, 1)  # a missing matplotlib is reported before the run
        self._planning = [c for c in callbacks_of(trainer) if isinstance(c, PlansChanges)]

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.report, self.values, self.advice = None, {}, []
        self._works = []
        self.machine = roofline_run.machine_of(trainer, pl_module, self.hardware)
        self._messages = roofline_run.clock_of_messages(trainer, pl_module)
        self._clock = StepClock(trainer.strategy, self._messages)
        self._learned = roofline_run.Learned(pl_module)
        self._windows = self._counted = self._micro_batches = 0
        self._analysed_at = self._told_at = None
        self._is_changed = False
        self._unwatch = watch_fetches(trainer, self._begin_fetch, self._end_fetch)

    # A window of accumulation, which is a step

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._clock.enter(FORWARD)  # before anything of ours
        self._position = batches_consumed(trainer)
        accumulated: int = trainer.accumulate_grad_batches
        if batch_idx % accumulated == 0:
            self._begin_window(trainer, pl_module)
        self._learned.add(batch)
        if self._trace is not None:
            self._clock.enter(None)

    def _begin_window(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop_analysis()  # of a window that was broken off
        interval: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        left = interval - trainer.global_step % interval if interval else 0
        self._clock.splits = self._clock.always_splits or 0 < left <= SPLIT_STEPS
        if self._is_due(trainer.global_step):
            self._trace, self._micro_batches = Trace(), 0
            optimizer = trainer.optimizers[0]
            undo = run_steps_in(trainer, lambda: self._analysing(pl_module, optimizer))
            self._undo.append(undo)

    def _is_due(self, step: int) -> bool:
        if self._analysed_at is None:
            return self._windows > 0
        since = step - self._analysed_at
        if since < 0:  # the run has gone back
            self._analysed_at = step
        return since >= self.every_n_steps or (
            self._is_changed and since >= max(1, self.every_n_steps // 10)
        )

    @contextmanager
    def _analysing(self, pl_module: LightningModule, optimizer: Optimizer) -> Iterator[None]:
        there = [t for t in tensors_there(pl_module, optimizer) if not t.is_meta]
        with tracing(pl_module, there, self._trace):
            yield
        self._micro_batches += 1

    @override
    def on_before_zero_grad(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        self._enter(OPTIMIZER)

    @override
    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        self._enter(BACKWARD)

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._enter(OPTIMIZER)

    def _enter(self, part: str) -> None:
        if self._trace is None:
            self._clock.enter(part)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._enter(OTHER)
        # Here, when whoever plans changes has had its turn before the batch.
        changes = [each.planned_change(self._position) for each in self._planning]
        self._is_changed = self._is_changed or any(changes)
        if is_accumulating(trainer):
            return
        self._windows += 1
        if self._trace is not None:
            self._finish_analysis(trainer, pl_module)
            self._leave_out()
        elif self._windows == 1:  # which has made states and caches
            self._leave_out()
        else:
            self._counted += 1
            self._clock.count()
            self._learned.close()
        interval: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if interval and trainer.global_step % interval == 0:
            self._log_values(trainer)
        self._clock.enter(OTHER)

    def _leave_out(self) -> None:
        self._clock.leave_out()
        self._learned.leave_out()

    def _finish_analysis(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trace = self._trace
        self._stop_analysis()
        assert trace is not None
        has_run = any(record.phase == BACKWARD for record in trace.records)
        if not has_run and not roofline_run.shares_batch(trainer):
            return  # the module's step has returned None
        step, told = trainer.global_step - 1, self._told_at
        # Whenever other blocks train a picture would be too many.
        is_regular = told is None or not 0 <= step - told < self.every_n_steps
        self.report = report_of(trace, pl_module)
        analysed = StepTime(self.report, self.machine)
        top_k = self.top_k if is_regular else 0
        self._works = roofline_run.works_of(trainer, analysed, top_k)  # collective
        self._analysed_at, self._is_changed = step, False
        if is_regular and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._told_at = step
            self._log_report(trainer)

    def _stop_analysis(self) -> None:
        while self._undo:
            self._undo.pop()()
        if self._trace is not None:
            self._trace.storages.close()
            self._trace = None

    def _stop_all(self) -> None:
        self._stop_analysis()
        if self._messages is not None:
            self._messages.stop()
        if self._unwatch is not None:
            self._unwatch()
            self._unwatch = None

    # What is told

    def _log_report(self, trainer: Trainer) -> None:
        if self.report is None or not trainer.is_global_zero:
            return
        with roofline_run.never_ends_run():
            rows = roofline_run.one_table(self._works)
            log_rows(trainer, "roofline/modules", rows, filename="roofline.jsonl")
        if self.plot:
            with roofline_run.never_ends_run():
                figure = self.report.plot(self.machine, top_k=self.top_k)
                log_figure(trainer, "roofline", figure)

    def _log_values(self, trainer: Trainer) -> None:
        """Since the last time; not by ``self.log``: times are no part of a run that is resumed."""
        self._clock.enter(None)
        learned = self._learned.total(trainer)  # collective
        if self._counted and self.report is not None:
            self.values = roofline_run.values_of(
                self._works,
                self._clock.seconds / self._counted,
                self.available_flops or self.machine.peak_flops,
            )
            self.values |= {f"{of}_per_s": n / self._clock.seconds for of, n in learned.items()}
            self.values |= {f"{part}_share": x for part, x in self._clock.shares().items()}
            metrics = {f"roofline/{name}": value for name, value in self.values.items()}
            for logger in trainer.loggers:
                with roofline_run.never_ends_run():
                    logger.log_metrics(metrics, step=lightning_logged.lightnings_line(trainer))
        self._clock.forget()
        self._counted = 0

    # What is no part of a step

    def _begin_fetch(self) -> None:
        self._fetches_within = self._clock.part
        if self._fetches_within is not None:
            self._clock.enter(DATA)

    def _end_fetch(self) -> None:
        if self._fetches_within is not None:
            self._clock.enter(self._fetches_within)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._clock.enter(OTHER)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._clock.enter(None)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._clock.enter(None)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._enter(OTHER)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop_all()
        if not self.values:  # else what is known of many steps stays, not that of the last few
            self._log_values(trainer)
        if self.report is None:
            rank_zero_warn(f"{WHERE}: no step was analysed; the second one is the first that is.")
            return
        setting = roofline_run.setting_of(trainer, self.values, self._micro_batches)
        step = StepTime(self.report, self.machine)
        self.advice = roofline_run.advice_of(trainer, step, setting)  # collective
        for each in self.advice:
            rank_zero_info(f"{WHERE}: {each}")
        if self.advice:
            rows = [{"advice": a.name, "gain": a.gain, "text": a.text} for a in self.advice]
            with roofline_run.never_ends_run():
                log_rows(trainer, "roofline/advice", rows, filename="roofline.jsonl")

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._stop_all()
