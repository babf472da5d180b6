"""What is learned when, and how long it is: easy before hard, short before long."""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_align._compat.lightning_trainer import is_accumulating, log_step_value
from lightning_align._errors import argument_error
from lightning_align.callbacks.curriculum_length import WHERE, LengthPart
from lightning_align.callbacks.curriculum_picture import MOST_POINTS, LossCurve, draw_run
from lightning_align.callbacks.curriculum_preflight import Preflight
from lightning_align.data.length_schedule import Samples
from lightning_align.data.skipped import SkippedBatches
from lightning_align.reports.pictures import log_figure, new_figure
from lightning_align.run.callbacks import bring, callbacks_of
from lightning_align.run.exact_resume import ExactResume
from lightning_align.run.position import batches_consumed
from lightning_align.run.protocols import (
    MeasuresSteps,
    length_refusal,
    sample_tokens,
    tokenizer_of,
    told_stream,
)
from lightning_align.run.replicas import of_every_rank
from lightning_align.run.skipping import skipped_batches, stream_position

_LOST_KEY = "lightning_align.curriculum"  # of a checkpoint: what each rank has lost


class Curriculum(Callback):
    """Let rows of batches grow (sequence length warm-up, arXiv:2108.06084).

    Every batch is a function of its number: the run resumes exactly, loaders may run ahead, and
    ``preview`` tells batches to come. Rows are cut in the training process, before anything counts
    their tokens; validation always has whole rows.

    Args:
        order: Order of samples by difficulty.
        length: How rows are cut: ``mode`` and ``scheduler``, see docs/curriculum.md.
        batch_size: Batches that grow.
        mixture: Weights of corpora over time.
        preflight: Whether the longest rows go through the module once before the first step, so
            that what does not fit into memory shows there.
        filename: PNG to write, relative to ``trainer.default_root_dir``; None draws nothing.

    Raises:
        ValueError: If there is nothing to do, a key is not known, or before training, if the data
            or the strategy cannot follow.

    Example:
        >>> linear = {"total_curriculum_step": 100, "difficulty_step": 8}
        >>> scheduler = {"min_difficulty": 8, "max_difficulty": 64, "schedule_type": "fixed_linear",
        ...              "schedule_config": linear}
        >>> curriculum = Curriculum(length={"mode": "reshape", "scheduler": scheduler})
        >>> [row["length"] for row in curriculum.preview([0, 50, 100])]
        [8, 32, 64]
    """

    def __init__(
        self,
        order: dict[str, Any] | None = None,
        length: dict[str, Any] | None = None,
        batch_size: dict[str, Any] | None = None,
        mixture: dict[str, Any] | None = None,
        preflight: bool = True,
        filename: str | None = "curriculum.png",
    ) -> None:
        parts = {"order": order, "batch_size": batch_size, "mixture": mixture}
        for argument, value in parts.items():
            if value is not None:
                raise argument_error(WHERE, argument, value, "is not there yet", "Leave it out")
        if length is None:
            rule = "one of order, length, batch_size and mixture must be given"
            raise argument_error(WHERE, "length", None, rule)
        if filename is not None and not filename.endswith(".png"):
            raise argument_error(WHERE, "filename", filename, "must end in '.png'")
        self.preflight = preflight
        self.filename = filename
        self._length = LengthPart(length)
        self._saved_settings: dict[str, Any] | None = None
        self._skipped: partial[SkippedBatches] | None = None
        self._preflight = Preflight(self._largest_batch)
        self._losses = LossCurve()
        self._lost_here: int | None = None  # of this rank, from the checkpoint that is loaded

    # What a batch is

    def preview(self, steps: Iterable[int]) -> list[dict[str, Any]]:
        """What batches will be, whatever the run has come to.

        Args:
            steps: Numbers of batches in the stream, counted from 0.
        """
        schedule = self._length.schedule
        return [
            {"batch": n, "length": schedule.length_at(n), "tokens": schedule.tokens_before(n)}
            for n in steps
        ]

    def planned_change(self, position: int) -> str | None:
        """That rows have another length from a batch on, by how many are trained before it."""
        if self._skipped is None or position == 0:
            return None
        skipped, schedule = self._skipped(), self._length.schedule
        before, now = (schedule.length_at(skipped.position_of(n)) for n in (position - 1, position))
        return f"Curriculum: rows of {now} tokens" if before != now else None

    def cut_batch(self, batch: Any, number: int) -> Any:
        """Batch ``number`` of the stream with rows of its length."""
        return self._length.cut(batch, number)

    # Before training

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        check_alone(trainer)
        if (rule := length_refusal(trainer)) is not None:
            way_out = "Give order instead, which has short samples before long ones"
            raise argument_error(WHERE, "length", self._length.mode, rule, way_out)
        bring(ExactResume, trainer, pl_module, stage)
        self._length.set_up(self._samples(trainer), tokenizer_of(trainer))
        self._skipped = partial(skipped_batches, trainer)
        if self.preflight:
            self._length.keep_first = True
            self._preflight.enter(trainer)
        if trainer.global_step == 0:  # a resumed run loads its state after setup
            self._length.lost, self._saved_settings = 0, None
            self._losses = LossCurve()
        try:
            if self.filename is not None:
                new_figure(1, 1)
        except ImportError as error:
            self.filename = None
            rank_zero_warn(f"Curriculum draws no picture at the end of the run. {error}")

    def _samples(self, trainer: Trainer) -> Samples | None:
        whole, stream = sample_tokens(trainer), told_stream(trainer) or {}
        if whole is None or "batch" not in stream:
            return None
        return Samples.constant(stream["batch"], whole)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        saved, self._saved_settings = self._saved_settings, None
        for argument, ours in self._settings().items():
            if saved is not None and saved.get(argument) != ours:
                rule = "the checkpoint was written with another one"
                way_out = "Continue that run as it was, or start a new one from its weights"
                raise argument_error(WHERE, argument, ours, rule, way_out)
        rank_zero_info(f"Curriculum: {self._length.described()}.")
        if trainer.lr_scheduler_configs and self._length.mode == "truncate":
            rank_zero_warn(
                "Curriculum: the learning rate is scheduled by steps, and steps have fewer tokens"
                " while rows are short. TokenSchedule counts tokens."
            )

    def _settings(self) -> dict[str, Any]:
        return {"length": self._length.settings()}

    # Steps

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        n = stream_position(trainer)
        self._length.count(n)
        self._log(pl_module, n)

    def _log(self, pl_module: LightningModule, n: int) -> None:
        values = {"length": self._length.schedule.length_at(n), "tokens_lost": self._length.lost}
        for name, value in values.items():
            held = torch.tensor(float(value), device=pl_module.device)
            log_step_value(pl_module, f"curriculum/{name}", held)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        consumed, accumulate = batches_consumed(trainer), trainer.accumulate_grad_batches
        n = skipped_batches(trainer).position_of(consumed - 1)
        if self.filename is None or is_accumulating(trainer) or not self._losses.wants(n):
            return
        if isinstance(pl_module, MeasuresSteps):
            found = pl_module.measured_step and pl_module.measured_step[0]
        else:  # Lightning has divided it
            found = outputs and accumulate * outputs["loss"]
        if isinstance(found, Tensor):
            self._losses.note(n, float(found))

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        last = stream_position(trainer)
        if self.filename is None or last == 0 or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        spaced = sorted({last * part // MOST_POINTS for part in range(MOST_POINTS)})
        figure = draw_run(self.preview(spaced), self._losses.points)
        for place in log_figure(trainer, "curriculum", figure, filename=self.filename):
            rank_zero_info(f"Curriculum drawn: {place}")

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._skipped = None
        self._preflight.leave(trainer)

    def _largest_batch(self) -> tuple[Any, str] | None:
        """The first batch with the longest rows of the run, unless they are as long already."""
        whole, self._length.whole = self._length.whole, None
        if whole is None:
            return None
        longest = self._length.schedule.distinct[-1]
        return self._length.cut_to(whole, longest), f"rows of {longest} tokens"

    # Resuming

    @override
    def state_dict(self) -> dict[str, Any]:
        losses = self._losses.state_dict()
        return {"settings": self._settings(), "lost": self._length.lost, "losses": losses}

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        # Compared when training starts: a checkpoint may be evaluated under any curriculum.
        self._saved_settings = dict(state_dict["settings"])
        self._losses.load_state_dict(state_dict["losses"])
        here, self._lost_here = self._lost_here, None
        self._length.lost = state_dict["lost"] if here is None else here

    @override
    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.world_size > 1:
            checkpoint[_LOST_KEY] = of_every_rank(trainer, self._length.lost)

    @override
    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if lost := checkpoint.get(_LOST_KEY):
            # By another number of ranks: one goes on with what all have lost.
            self._lost_here = sum(lost) if trainer.is_global_zero else 0
            if len(lost) == trainer.world_size:
                self._lost_here = lost[trainer.global_rank]


def check_alone(trainer: Trainer) -> None:
    """Refuse two callbacks of which both would cut batches.

    Raises:
        ValueError: If there are.
    """
    found = [type(each).__name__ for each in callbacks_of(trainer) if isinstance(each, Curriculum)]
    if len(found) > 1:
        rule = f"the Trainer has {len(found)} of them, and a batch is cut once"
        raise argument_error(WHERE, "callbacks", found, rule, "Put all parts into one")
