"""What is learned when, and how long it is: easy before hard, short before long."""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_align._compat.lightning_trainer import (
    is_accumulating,
    is_compiled_whole,
    log_step_value,
)
from lightning_align._compat.torch_modules import is_compiled
from lightning_align._declared import declared
from lightning_align._errors import argument_error
from lightning_align.callbacks.curriculum.checks import check_orders
from lightning_align.callbacks.curriculum.feedback import Feedback, self_paced
from lightning_align.callbacks.curriculum.length import WHERE, LengthPart
from lightning_align.callbacks.curriculum.picture import MOST_POINTS, LossCurve, draw_run
from lightning_align.callbacks.curriculum.preflight import Preflight, largest_batch
from lightning_align.callbacks.curriculum.stream import StreamPart, following
from lightning_align.data.length_schedule import Samples
from lightning_align.data.skipped import SkippedBatches
from lightning_align.figure import new_figure
from lightning_align.reports.pictures import log_figure
from lightning_align.run.callbacks import bring, callbacks_of, put_first
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

RECOMPILE_LIMIT = 8  # torch._dynamo.config's, which takes seconds to import
_LOST_KEY = "lightning_align.curriculum"  # of a checkpoint: what each rank has lost


@declared
class Curriculum(Callback):
    """Decide what a model learns when, and how long its rows are.

    Every batch is a function of its number: a run resumes exactly, loaders may run ahead, and
    ``preview`` tells batches to come. Order, size and corpora of batches are handed to the
    datamodule before its loaders exist. Rows are cut in the training process, before anything
    counts their tokens (sequence length warm-up, arXiv:2108.06084); validation has whole rows. The
    keys of each part are in docs/curriculum.md.

    Args:
        order: Easy samples before hard ones, with difficulties and scheduler.
        length: Short rows before long ones, with mode and scheduler.
        batch_size: Small batches before large ones, with scheduler or constant_tokens.
        mixture: Weights of corpora over time, with steps and weights.
        preflight: Whether the largest batch goes through the module once before the first step, so
            that what does not fit into memory shows there.
        filename: PNG to write in the folder of the run; None draws nothing.

    Raises:
        ValueError: If there is nothing to do, a key is not known, or before training, if the data
            or the strategy cannot follow.

    Example:
        >>> linear = {"total_curriculum_step": 100, "difficulty_step": 8}
        >>> scheduler = {"min_difficulty": 8, "max_difficulty": 64, "schedule_type": "fixed_linear",
        ...              "schedule_config": linear}
        >>> curriculum = Curriculum(length={"mode": "reshape", "scheduler": scheduler})
        >>> {row["batch"]: row["length"] for row in curriculum.preview([0, 50, 100])}
        {0: 8, 50: 32, 100: 64}
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
        self._stream = StreamPart(order, batch_size, mixture)
        self._length = None if length is None else LengthPart(length)
        if self._length is None and self._stream.is_empty:
            rule = "one of order, length, batch_size and mixture must be given"
            raise argument_error(WHERE, "length", None, rule)
        if filename is not None and not filename.endswith(".png"):
            raise argument_error(WHERE, "filename", filename, "must end in '.png'")
        if self._length is not None and self._length.mode == "bucket":
            check_buckets(self._stream)
        self.preflight = preflight
        self.filename = filename
        self._saved_settings: dict[str, Any] | None = None
        self._skipped: partial[SkippedBatches] | None = None
        self._preflight = Preflight(self._largest_batch)
        self._first: tuple[int, Any] | None = None  # batch of this process and its number, whole
        self._logged: dict[str, float] = {}  # what, and in which epoch
        self._losses = LossCurve()
        paced = {
            "length": self._length and self._length.scheduler,
            "order": self._stream.self_paced,
        }
        self._feedback = Feedback(self_paced(paced))
        self._lost_here: int | None = None  # of this rank, from the checkpoint that is loaded

    # What a batch is

    def preview(self, steps: Iterable[int]) -> list[dict[str, Any]]:
        """What batches will be, whatever the run has come to; before a run, what is known then.

        Args:
            steps: Numbers of batches in the stream, counted from 0.
        """
        return [{"batch": n, **self._length_of(n), **self._stream.described(n)} for n in steps]

    def _length_of(self, n: int) -> dict[str, Any]:
        if self._length is None:
            return {}
        schedule = self._length.schedule
        return {"length": self._length.length_at(n), "tokens": schedule.tokens_before(n)}

    def planned_change(self, position: int) -> str | None:
        """What is another level of the loss, by intent, from a batch on.

        Args:
            position: How many batches are trained before it.
        """
        if self._skipped is None or position == 0:
            return None
        skipped = self._skipped()
        before, now = skipped.position_of(position - 1), skipped.position_of(position)
        found = [*self._stream.changes(before, now)]
        if self._length is not None:
            lengths = [self._length.schedule.length_at(n) for n in (before, now)]
            found += [f"rows of {lengths[1]} tokens"] if lengths[0] != lengths[1] else []
        return f"Curriculum: {', '.join(found)}" if found else None

    def cut_batch(self, batch: Any, number: int) -> Any:
        """Batch ``number`` of the stream with rows of its length."""
        if self._first is None:
            self._first = number, batch
        return batch if self._length is None else self._length.cut(batch, number)

    # Before training

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        check_alone(trainer)
        bring(ExactResume, trainer, pl_module, stage)
        if self._length is not None:
            check_rows(trainer, self._length.mode)
        if not self._stream.is_empty:
            self._stream.set_up(trainer, self._length)
        if self._length is not None:
            if self._length.mode == "bucket":
                data = following(trainer, "length")
                self._length.sampler = data.follow_curriculum(buckets=self._length.plan)
            self._length.set_up(self._samples(trainer), tokenizer_of(trainer))
        if self._feedback.schedulers:
            put_first(trainer, self)  # before anybody saves
        self._skipped = partial(skipped_batches, trainer)
        self._logged = {}
        if self.preflight:
            self._first = None
            self._preflight.enter(trainer)
        else:
            self._first = (0, None)
        if trainer.global_step == 0:  # a resumed run loads its state after setup
            self._saved_settings, self._losses = None, LossCurve()
            self._feedback.reset()
            if self._length is not None:
                self._length.lost = 0
        try:
            if self.filename is not None:
                new_figure(1, 1)
        except ImportError as error:
            self.filename = None
            rank_zero_warn(f"Curriculum draws no picture at the end of the run. {error}")

    def _samples(self, trainer: Trainer) -> Samples | None:
        """How many samples batches have, over all ranks."""
        whole, stream = sample_tokens(trainer), told_stream(trainer) or {}
        if self._stream.sampler is not None:
            return Samples(self._stream.sampler.before, whole)
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
        if self._length is not None:
            self._say_lengths(trainer, pl_module, self._length)
        cuts = self._length is not None and self._length.mode == "truncate"
        unequal = (cuts or self._stream.sizes is not None) and not self._stream.keeps_tokens
        if trainer.lr_scheduler_configs and unequal:
            rank_zero_warn(
                "Curriculum: the learning rate is scheduled by steps, and steps have fewer tokens"
                " while rows are short or batches small. TokenSchedule counts tokens."
            )

    def _say_lengths(
        self, trainer: Trainer, pl_module: LightningModule, length: LengthPart
    ) -> None:
        """Say which lengths there are, and where that may not be what is meant."""
        rank_zero_info(f"Curriculum: {length.described()}.")
        many, whole = length.schedule.distinct, sample_tokens(trainer)
        if whole is not None and many[-1] < whole:
            rank_zero_warn(
                f"Curriculum: the longest rows have {many[-1]} tokens, and samples have {whole}:"
                " whole ones are validated and never trained on."
            )
        compiled = is_compiled_whole(pl_module) or any(map(is_compiled, pl_module.modules()))
        if len(many) > RECOMPILE_LIMIT and compiled:
            rank_zero_warn(
                f"Curriculum: there are {len(many)} lengths, and torch.compile gives up silently"
                f" after {RECOMPILE_LIMIT} shapes. Pass it dynamic=True, or raise difficulty_step."
            )

    def _settings(self) -> dict[str, Any]:
        """What no datamodule compares."""
        paced, own = self._stream.self_paced, self._stream.own
        order = {"rule": paced.rule()} if paced else {}
        return {
            "length": self._length and self._length.settings(),
            "order": {**order, **(own.stream() if own else {})} or None,
        }

    # Steps

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_orders(trainer, self._ordering(), self._stream.own)
        self._feedback.begin(trainer, pl_module)

    def _ordering(self) -> list[str]:
        """Which arguments decide what samples a batch has."""
        in_buckets = self._length is not None and self._length.mode == "bucket"
        return ["length"] if in_buckets else self._stream.ordering

    @override
    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        self._feedback.add(trainer, loss)

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        n = stream_position(trainer)
        if self._length is not None:
            self._length.count(n)
        values = self._scalars(n)
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        is_due = every and (trainer.global_step + 1) % every == 0
        # Lightning goes on showing a value until its epoch ends, and each log of one takes time.
        now = {"epoch": trainer.current_epoch, **values}
        if not is_due and self._logged == now:
            return
        self._logged = now
        for name, value in values.items():
            _log(pl_module, name, value)
        if self._length is not None:
            held = torch.tensor(float(self._length.lost), device=pl_module.device)
            _log(pl_module, "tokens_lost", trainer.strategy.reduce(held, reduce_op="sum"))

    def _scalars(self, n: int) -> dict[str, float]:
        """What batch n is, as numbers."""
        found = self._stream.scalars(n)
        if self._length is not None:
            found["length"] = self._length.length_at(n)
        return found

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._feedback.end_batch(trainer, pl_module)
        if self.filename is None or is_accumulating(trainer):
            return
        n = skipped_batches(trainer).position_of(batches_consumed(trainer) - 1)
        if not self._losses.wants(n):
            return
        if isinstance(pl_module, MeasuresSteps):
            found = pl_module.measured_step and pl_module.measured_step[0]
        else:
            found = outputs.get("loss") if isinstance(outputs, dict) else None
            if found is not None and pl_module.automatic_optimization:
                found = found * trainer.accumulate_grad_batches  # Lightning has divided it
        if isinstance(found, Tensor) and found.numel() == 1:
            self._losses.note(n, float(found))

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        last = stream_position(trainer)
        if last == 0 or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if self._length is not None:
            schedule = self._length.schedule
            reached, longest = schedule.length_at(last - 1), schedule.distinct[-1]
            if reached < longest:
                rank_zero_warn(
                    f"Curriculum: training ended at rows of {reached} tokens, and the schedule goes"
                    f" on to {longest}: longer rows were not trained on."
                )
        if unseen := self._stream.unseen(last):
            rank_zero_info(f"Curriculum: {unseen}.")
        if self.filename is not None:
            spaced = sorted({last * part // MOST_POINTS for part in range(MOST_POINTS)})
            figure = draw_run(self.preview(spaced), self._losses.points)
            for place in log_figure(trainer, "curriculum", figure, filename=self.filename):
                rank_zero_info(f"Curriculum drawn: {place}")

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._skipped = None
        self._preflight.leave(trainer)

    def _largest_batch(self) -> tuple[Any, str] | None:
        """The first batch, made as large as one of the run will be, unless it is the largest."""
        if self._first is None:  # nothing was drawn through us
            return None
        first, self._first = self._first, (0, None)
        return largest_batch(*first, self._stream.sizes, self._length)

    # Resuming

    @override
    def state_dict(self) -> dict[str, Any]:
        lost = self._length.lost if self._length is not None else 0
        state = {
            "settings": self._settings(),
            "lost": lost,
            "logged": dict(self._logged),
            "losses": self._losses.state_dict(),
        }
        paced = self._feedback.schedulers
        return {**state, "feedback": self._feedback.state_dict()} if paced else state

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        # Compared when training starts: a checkpoint may be evaluated under any curriculum.
        self._saved_settings = dict(state_dict["settings"])
        self._losses.load_state_dict(state_dict["losses"])
        self._logged = dict(state_dict["logged"])
        if self._saved_settings == self._settings() and "feedback" in state_dict:
            self._feedback.load_state_dict(state_dict["feedback"])
        here, self._lost_here = self._lost_here, None
        if self._length is not None:
            self._length.lost = state_dict["lost"] if here is None else here

    @override
    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.world_size > 1 and self._length is not None:
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


def _log(module: LightningModule, name: str, value: float | Tensor) -> None:
    """Log a number of this step."""
    if not isinstance(value, Tensor):
        value = torch.tensor(float(value), device=module.device)
    log_step_value(module, f"curriculum/{name}", value)


def check_rows(trainer: Trainer, mode: str) -> None:
    """Refuse to cut rows that mean something as a whole.

    Raises:
        ValueError: If the datamodule says so.
    """
    if (rule := length_refusal(trainer)) is not None:
        way_out = "Give order instead, which has short samples before long ones"
        raise argument_error(WHERE, "length", mode, rule, way_out)


def check_buckets(stream: StreamPart) -> None:
    """Refuse another say in which samples a batch has than that of buckets.

    Raises:
        ValueError: If there is one.
    """
    if stream.ordering:
        rule = "mode='bucket' says which pieces of documents a batch has, and how many"
        way_out = f"Leave {stream.ordering[0]} out, or take mode='reshape'; odds and cycles of"
        way_out += " length let short pieces come first"
        raise argument_error(WHERE, ", ".join(stream.ordering), "...", rule, way_out)


def check_alone(trainer: Trainer) -> None:
    """Refuse two callbacks of which both would cut batches.

    Raises:
        ValueError: If there are.
    """
    found = [type(each).__name__ for each in callbacks_of(trainer) if isinstance(each, Curriculum)]
    if len(found) > 1:
        rule = f"the Trainer has {len(found)} of them, and a batch is cut once"
        raise argument_error(WHERE, "callbacks", found, rule, "Put all parts into one")
