"""Learning rate and length of a run in tokens instead of steps."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_align._compat.lightning_trainer import is_accumulating
from lightning_align._declared import declared
from lightning_align._errors import argument_error, finite_number
from lightning_align.run.callbacks import put_first
from lightning_align.run.protocols import CountsTokens
from lightning_align.schedules import DECAYS, SCHEDULES, lr_fraction


@declared
class TokenSchedule(Callback):
    """Set the learning rate by the tokens learned from so far, and end training at ``max_tokens``.

    The learning rate of a step follows from the tokens of all steps before it, over all ranks and
    accumulated batches; each parameter group keeps its own peak, the ``lr`` it was built with.
    Training ends after the step that spends the budget, as if by ``trainer.should_stop``:
    validation and checkpoints follow, ``min_steps`` and ``min_epochs`` go first. Costs one small
    sum over the ranks per batch.

    Args:
        max_tokens: Tokens to learn from, over all ranks; a decay ends there.
        schedule: cosine, linear, wsd (warm-up, stable, decay) or constant.
        warmup_tokens: Tokens of the linear warm-up from ``min_lr_ratio`` of the peak to the peak.
        decay_tokens: Tokens of wsd's decay at the end; default a tenth of ``max_tokens``.
        decay_type: Shape of wsd's decay: 1-sqrt (default), linear or cosine.
        min_lr_ratio: Fraction of the peak at which the warm-up begins and a decay ends.
        stop: Whether training ends at ``max_tokens``; otherwise it goes on with the last value.

    Attributes:
        tokens_seen: Tokens of all optimizer steps so far, over all ranks.

    Raises:
        ValueError: If a value is out of its range or belongs to another schedule.

    Example:
        >>> callback = TokenSchedule(max_tokens=1_000_000_000, warmup_tokens=10_000_000)

    Note: the module must have no lr_scheduler of its own. A resumed run may change the schedule
    only where the learning rate does not jump: a constant or wsd run can be prolonged until its
    decay begins.
    """

    def __init__(
        self,
        max_tokens: int,
        schedule: str = "cosine",
        warmup_tokens: int = 0,
        decay_tokens: int | None = None,
        decay_type: str | None = None,
        min_lr_ratio: float = 0.1,
        stop: bool = True,
    ) -> None:
        if schedule not in SCHEDULES:
            rule = f"must be one of {list(SCHEDULES)}"
            raise argument_error("TokenSchedule", "schedule", schedule, rule)
        for argument, value in {"decay_tokens": decay_tokens, "decay_type": decay_type}.items():
            if value is not None and schedule != "wsd":
                rule = f"belongs to schedule='wsd', and this is {schedule!r}"
                raise argument_error("TokenSchedule", argument, value, rule, "Leave it out")
        if decay_type is not None and decay_type not in DECAYS:
            rule = f"must be one of {list(DECAYS)}"
            raise argument_error("TokenSchedule", "decay_type", decay_type, rule)
        if not 0 <= min_lr_ratio <= 1:
            rule = "must be in [0, 1], a fraction"
            raise argument_error("TokenSchedule", "min_lr_ratio", min_lr_ratio, rule)
        counts = {"max_tokens": max_tokens, "warmup_tokens": warmup_tokens}
        for argument, value in {**counts, "decay_tokens": decay_tokens or 0}.items():
            if finite_number(value) is None:
                raise argument_error("TokenSchedule", argument, value, "must be a finite number")
        if decay_tokens is None:
            decay_tokens = max(1, int(max_tokens) // 10)  # enough: arXiv:2404.06395, section 4.3
        _check_lengths(max_tokens, warmup_tokens, decay_tokens, schedule)
        self.settings: dict[str, Any] = {
            "schedule": schedule,
            "max_tokens": int(max_tokens),
            "warmup_tokens": int(warmup_tokens),
            "decay_tokens": int(decay_tokens),
            "decay_type": decay_type or "1-sqrt",
            "min_lr_ratio": min_lr_ratio,
        }
        self.stop = stop
        self.tokens_seen = 0
        self._saved_settings: dict[str, Any] | None = None
        # Of the open accumulation window and of the current batch, over all ranks. Tensors, for a
        # batch on an accelerator must not be waited for before its window closes.
        self._window: Tensor | int = 0
        self._batch_tokens: Tensor | int = 0
        self._module_counts = False

    def count_tokens(self, batch: Any) -> Tensor | int:
        """Tokens that this rank learns from in one batch; override it for batches of your own.

        Targets of a text batch (labels other than -100, without the first of each row, which
        nothing predicts), completion tokens of preference pairs, else all of ``input_ids``.

        Raises:
            ValueError: If the batch holds nothing to count.
        """
        found = batch if isinstance(batch, Mapping) else {}
        tensors = {name: x for name, x in found.items() if isinstance(x, Tensor) and x.ndim == 2}
        if "labels" in tensors:
            return (tensors["labels"][:, 1:] != -100).sum()
        if "completion_mask" in tensors:
            return tensors["completion_mask"][:, 1:].bool().sum()
        if "input_ids" in tensors:
            return tensors["input_ids"].numel()
        rule = "must hold labels, completion_mask or input_ids of shape (rows, tokens)"
        way_out = "Or override count_tokens(batch) in a subclass"
        raise argument_error(type(self).__name__, "batch", _contents(batch), rule, way_out)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and trainer.global_step == 0:  # a resumed run loads its count afterwards
            self.tokens_seen, self._window, self._saved_settings = 0, 0, None
        self._module_counts = isinstance(pl_module, CountsTokens)
        # First in line: what another callback saves at the end of a batch has that batch's tokens.
        put_first(trainer, self)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.lr_scheduler_configs:
            theirs = type(trainer.lr_scheduler_configs[0].scheduler).__name__
            rule = (
                f"{type(pl_module).__name__} has the scheduler {theirs}, and only one of the two"
                " can set the learning rate"
            )
            way_out = "Leave lr_scheduler out of the module, or TokenSchedule out of the callbacks"
            name = self.settings["schedule"]
            raise argument_error("TokenSchedule", "schedule", name, rule, way_out)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._saved_settings is not None:
            self._check_continuity(self._saved_settings)
            self._saved_settings = None
        elif trainer.global_step > 0 and self.tokens_seen == 0:
            self.tokens_seen = self._tokens_before(trainer, pl_module)
        self._set_learning_rates(trainer)
        self._stop_if_spent(trainer)

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        count = torch.zeros((), dtype=torch.int64, device=pl_module.device)
        count += self.count_tokens(batch)
        self._batch_tokens = trainer.strategy.reduce(count, reduce_op="sum")

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._window = self._window + self._batch_tokens
        if is_accumulating(trainer):
            return
        self.tokens_seen += int(self._window)
        self._window = 0
        if not self._module_counts:  # our modules log both themselves
            used = float(trainer.optimizers[0].param_groups[0]["lr"])
            pl_module.log_dict({"lr": used, "tokens_seen": float(self.tokens_seen)})
        self._set_learning_rates(trainer)
        self._stop_if_spent(trainer)

    def forget_window(self) -> None:
        """The step of the open window is left out: its tokens do not count."""
        self._window, self._batch_tokens = 0, 0

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        max_tokens = self.settings["max_tokens"]
        if self.tokens_seen < max_tokens and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            rank_zero_warn(
                f"TokenSchedule(max_tokens={max_tokens}): training ended after {self.tokens_seen}"
                f" tokens, with {lr_fraction(self.tokens_seen, **self.settings):.2g} of the peak"
                " learning rate. If something else should not end it, raise max_epochs, max_steps"
                " or max_time."
            )

    @override
    def state_dict(self) -> dict[str, Any]:
        settings = dict(self.settings)
        return {"tokens_seen": self.tokens_seen, "window": int(self._window), "settings": settings}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.tokens_seen, self._window = state_dict["tokens_seen"], state_dict["window"]
        # Compared when training starts: a checkpoint may be evaluated under any schedule.
        self._saved_settings = dict(state_dict["settings"])

    def _set_learning_rates(self, trainer: Trainer) -> None:
        fraction = lr_fraction(self.tokens_seen, **self.settings)
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                # torch's name for the peak: it travels in the optimizer's state.
                lr = group["lr"]
                peak = group.setdefault("initial_lr", lr.clone() if isinstance(lr, Tensor) else lr)
                if isinstance(lr, Tensor):
                    lr.copy_(fraction * peak)
                else:
                    group["lr"] = fraction * peak

    def _stop_if_spent(self, trainer: Trainer) -> None:
        max_tokens = self.settings["max_tokens"]
        if self.stop and self.tokens_seen >= max_tokens and not trainer.should_stop:
            rank_zero_info(
                f"TokenSchedule(max_tokens={max_tokens}): {self.tokens_seen} tokens at step"
                f" {trainer.global_step}, training ends."
            )
            trainer.should_stop = True

    def _check_continuity(self, saved: dict[str, Any]) -> None:
        """Refuse a resume at which the learning rate would jump.

        Raises:
            ValueError: If the checkpoint's schedule and this one differ at this point of the run.
        """
        theirs = lr_fraction(self.tokens_seen, **saved)
        ours = lr_fraction(self.tokens_seen, **self.settings)
        if ours == theirs:
            return
        changed = next(name for name, value in self.settings.items() if value != saved[name])
        rule = (
            f"the checkpoint was written with {saved[changed]!r}, and after {self.tokens_seen}"
            f" tokens the learning rate would jump from {theirs:.4g} to {ours:.4g} of its peak"
        )
        way_out = (
            "Resume from a checkpoint before the decay began, keep the schedule, or start a new"
            " run from the weights"
        )
        raise argument_error("TokenSchedule", changed, self.settings[changed], rule, way_out)

    def _tokens_before(self, trainer: Trainer, pl_module: LightningModule) -> int:
        """Tokens of a run that had no TokenSchedule until now.

        Raises:
            ValueError: If the module has not counted them.
        """
        if isinstance(pl_module, CountsTokens):
            return pl_module.tokens_seen
        rule = (
            f"the checkpoint is of step {trainer.global_step} and does not say how many tokens"
            " that was"
        )
        way_out = "Start a new run from the weights"
        most = self.settings["max_tokens"]
        raise argument_error("TokenSchedule", "max_tokens", most, rule, way_out)


def _check_lengths(max_tokens: int, warmup_tokens: int, decay_tokens: int, schedule: str) -> None:
    """Refuse lengths that are not positive, or do not fit into the budget.

    Raises:
        ValueError: If one of them is out of its range.
    """
    if max_tokens < 1:
        raise argument_error("TokenSchedule", "max_tokens", max_tokens, "must be at least 1 token")
    if warmup_tokens < 0:
        rule = "must not be negative"
        raise argument_error("TokenSchedule", "warmup_tokens", warmup_tokens, rule)
    if decay_tokens < 1:
        rule = "must be at least 1 token"
        raise argument_error("TokenSchedule", "decay_tokens", decay_tokens, rule)
    decay = decay_tokens if schedule == "wsd" else 0
    if warmup_tokens + decay > max_tokens:
        rule = f"is less than warm-up and decay need together, {warmup_tokens} + {decay} tokens"
        raise argument_error("TokenSchedule", "max_tokens", max_tokens, rule)


def _contents(batch: Any) -> str:
    """What a batch holds, for an error message."""
    if isinstance(batch, Mapping):
        return "{" + ", ".join(f"{name}: {_contents(x)}" for name, x in batch.items()) + "}"
    if isinstance(batch, (list, tuple)):
        return "[" + ", ".join(_contents(x) for x in batch) + "]"
    name = type(batch).__name__
    return f"{name} {tuple(batch.shape)}" if isinstance(batch, Tensor) else name
