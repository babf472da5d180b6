"""What a preference run does to its pairs and to its model, beside its loss."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from typing_extensions import override

from lightning_align._compat import lightning_logged
from lightning_align._declared import declared
from lightning_align._errors import argument_error, check_least
from lightning_align.callbacks.first_loss import check_first_loss
from lightning_align.callbacks.policy_kl import (
    estimate_policy_kl,
    prompts_that_fit,
    sampled_policy,
)
from lightning_align.callbacks.preference_picture import MarginHistory, draw_diagnostics
from lightning_align.data.tokenizer import encode, load_tokenizer
from lightning_align.figure import new_figure
from lightning_align.losses import MARGIN_BINS, FirstLoss, KLEstimate
from lightning_align.reports.pictures import log_figure
from lightning_align.run.protocols import (
    CountsMargins,
    ScoresPairs,
    all_ranks_run_model,
    held_out_prompts,
    one_rank_runs_model,
    tokenizer_of,
)

TITLES = {"train": "training pairs", "val": "held-out pairs"}


@declared
class PreferenceDiagnostics(Callback):
    """Show how the margins of pairs move, how far the policy has gone, and whether it began right.

    Draws histograms of the margin of rewards over time, of training and of held-out pairs, and
    sends the picture to every logger that takes images when training ends. Before the first step
    it compares the loss with its value in theory, and finds out whether dropout, dtype or kernel is
    the cause where it is off. With ``kl_every_n_train_steps`` the policy continues held-out prompts
    and KL(policy || reference) is estimated on its own texts, in nats per text: ``kl/policy``, with
    its standard error ``kl/policy_se``, by Schulman's k3, and by his k1; ``kl/policy_per_token``.

    Training is the same to the last bit. It costs one more forward before the first step, and for
    each KL the time of ``kl_max_new_tokens`` forwards of 16 prompts at a time; ranks share them,
    but where they hold parts of the model, and then all continue all of them.

    Args:
        every_n_train_steps: Optimizer steps whose training pairs make one histogram.
        kl_every_n_train_steps: Optimizer steps between estimates of the KL, which is estimated when
            training ends, too; None for none.
        kl_num_prompts: Prompts to continue, at most.
        kl_max_new_tokens: Tokens to write after each, at most; the KL is that of so many.
        kl_prompts: Texts to continue; default the datamodule's held-out prompts.
        tokenizer: A folder, hub name or transformers tokenizer; default the datamodule's.
        check_first_loss: Whether to compare the loss before the first step with theory.
        filename: PNG to write in the folder of the run; None for none where a logger takes
            images.
        seed: Seed of the samples, which differ from step to step.

    Raises:
        ValueError: If a value is out of its range; at ``setup``, if the module trains no pairs that
            it tells of, or a KL is asked for without prompts, a tokenizer, a reference at hand or a
            model with ``generate``, or neither a rank can run the model nor all together.

    Example:
        >>> callback = PreferenceDiagnostics(kl_every_n_train_steps=100, kl_max_new_tokens=32)

    Note: a module of your own is served if it has ``margin_counts``, ``options`` and
    ``score_pairs``, see docs/contract.md. Of unpaired records there is no margin, and they are
    refused.
    """

    def __init__(
        self,
        every_n_train_steps: int = 20,
        kl_every_n_train_steps: int | None = None,
        kl_num_prompts: int = 64,
        kl_max_new_tokens: int = 64,
        kl_prompts: Sequence[str] | None = None,
        tokenizer: str | Any | None = None,
        check_first_loss: bool = True,
        filename: str | None = "preferences.png",
        seed: int = 0,
    ) -> None:
        where = "PreferenceDiagnostics"
        check_least(where, 1, every_n_train_steps=every_n_train_steps)
        check_least(where, 1, kl_max_new_tokens=kl_max_new_tokens)
        check_least(where, 2, kl_num_prompts=kl_num_prompts)
        check_least(where, 0, seed=seed)
        if kl_every_n_train_steps is not None:
            check_least(where, 1, kl_every_n_train_steps=kl_every_n_train_steps)
        elif kl_prompts is not None:
            rule = "serve the KL, which is not asked for"
            raise argument_error(
                where, "kl_prompts", kl_prompts, rule, "Set kl_every_n_train_steps"
            )
        if isinstance(kl_prompts, str) or (kl_prompts is not None and not all(kl_prompts)):
            rule = "must be a list of texts, none of them empty"
            raise argument_error(where, "kl_prompts", kl_prompts, rule)
        if filename is not None and not filename.endswith(".png"):
            raise argument_error(where, "filename", filename, "must end in '.png'")
        self.every_n_train_steps = every_n_train_steps
        self.kl_every_n_train_steps = kl_every_n_train_steps
        self.kl_num_prompts = kl_num_prompts
        self.kl_max_new_tokens = kl_max_new_tokens
        self.kl_prompts = None if kl_prompts is None else list(kl_prompts)
        self.tokenizer = tokenizer
        self.check_first_loss = check_first_loss
        self.filename = filename
        self.seed = seed
        self.margins = {name: MarginHistory() for name in TITLES}
        self.kl: list[tuple[int, KLEstimate]] = []
        self.first_losses: list[FirstLoss] = []
        self._open = torch.zeros(MARGIN_BINS)  # pairs since the latest histogram, over all ranks
        self._step = 0  # up to which steps are taken in
        self._tokenizer: Any = None
        self._prompts: list[Sequence[int]] = []

    # Set-up

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        where, name = "PreferenceDiagnostics", type(pl_module).__name__
        if not isinstance(pl_module, CountsMargins) or not isinstance(pl_module, ScoresPairs):
            rule = "it trains no pairs that it tells of"
            way_out = "Use DPOModule, or give the module margin_counts, options and score_pairs"
            raise argument_error(where, "pl_module", name, rule, way_out)
        if pl_module.options.is_unpaired:
            rule = f"its loss {pl_module.options.loss_type!r} is of single completions"
            way_out = "Leave PreferenceDiagnostics out, or train with a loss of pairs"
            raise argument_error(where, "pl_module", name, rule, way_out)
        new_figure(1, 1)  # a missing matplotlib is reported before the run, not after it
        if self.kl_every_n_train_steps is not None:
            self._set_up_kl(trainer, pl_module)

    def _set_up_kl(self, trainer: Trainer, pl_module: LightningModule) -> None:
        where, asked = "PreferenceDiagnostics", "kl_every_n_train_steps"
        if not _runs_model(trainer):
            rule = f"under {type(trainer.strategy).__name__} no rank may hold the whole model"
            way_out = "Use one device or DDP, or leave it out"
            raise argument_error(where, asked, self.kl_every_n_train_steps, rule, way_out)
        source = self.tokenizer if self.tokenizer is not None else tokenizer_of(trainer)
        if source is None:
            way_out = "Pass a folder, a hub name or a transformers tokenizer"
            raise argument_error(where, "tokenizer", None, "the datamodule has none", way_out)
        self._tokenizer = load_tokenizer(where, source)
        policy = sampled_policy(pl_module)
        prompts = held_out_prompts(trainer)
        if self.kl_prompts is not None:
            prompts = encode(self._tokenizer, self.kl_prompts, add_special_tokens=True)
        self._prompts = prompts_that_fit(
            prompts, policy, self.kl_num_prompts, self.kl_max_new_tokens
        )

    # The run

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step
        self._open = self._open.to(pl_module.device)

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.first_losses or not self.check_first_loss or trainer.global_step > 0:
            return
        if batch_idx > 0 or trainer.current_epoch > 0:  # in a first window of several batches
            return
        if not _runs_model(trainer):
            name = type(trainer.strategy).__name__
            rank_zero_info(f"PreferenceDiagnostics: the first loss is not checked under {name}.")
            return
        self.first_losses = check_first_loss(trainer, pl_module, batch)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step, before = trainer.global_step, self._step
        if step == before:  # inside an accumulation
            return
        self._step = step
        counts = _counts(pl_module)
        if counts is not None:
            self._open = self._open + counts
        every = self.every_n_train_steps
        if step // every > before // every:  # with several optimizers steps may jump
            self._close(step)
        every = self.kl_every_n_train_steps or 0
        if every and step // every > before // every:
            self._estimate_kl(trainer, pl_module)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        counts = _counts(pl_module)
        if trainer.state.fn == "fit" and not trainer.sanity_checking and counts is not None:
            self.margins["val"].add(trainer.global_step, counts)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        step = trainer.global_step
        self._close(step)
        if self.kl_every_n_train_steps and step and (not self.kl or self.kl[-1][0] < step):
            self._estimate_kl(trainer, pl_module)
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if not self.kl and not any(history.steps for history in self.margins.values()):
            return
        titled = {TITLES[name]: history for name, history in self.margins.items()}
        figure = draw_diagnostics(titled, self.kl)
        for place in log_figure(trainer, "preferences", figure, filename=self.filename):
            rank_zero_info(f"Margins drawn: {place}")

    def _close(self, step: int) -> None:
        self.margins["train"].add(step, self._open)
        self._open = torch.zeros_like(self._open)

    def _estimate_kl(self, trainer: Trainer, pl_module: LightningModule) -> None:
        options = {"max_new_tokens": self.kl_max_new_tokens, "seed": self.seed}
        found = estimate_policy_kl(trainer, pl_module, self._tokenizer, self._prompts, **options)
        if found is None:
            return
        self.kl.append((trainer.global_step, found))
        values = {
            "kl/policy": found.kl,
            "kl/policy_se": found.standard_error,
            "kl/policy_k1": found.k1,
            "kl/policy_k1_se": found.k1_standard_error,
            "kl/policy_per_token": found.per_token,
        }
        _log(trainer, pl_module, values)

    # The state

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "margins": {name: history.state_dict() for name, history in self.margins.items()},
            "open": self._open.cpu(),
            "kl": [[step, asdict(found)] for step, found in self.kl],
            "first_losses": [asdict(each) for each in self.first_losses],
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        saved = state_dict["margins"]
        self.margins = {name: MarginHistory.from_state(saved[name]) for name in TITLES}
        self._open = state_dict["open"].to(self._open.device, copy=True)
        self.kl = [(step, KLEstimate(**found)) for step, found in state_dict["kl"]]
        self.first_losses = [FirstLoss(**each) for each in state_dict["first_losses"]]


def _runs_model(trainer: Trainer) -> bool:
    """Whether ranks can call the model, alone or all at once."""
    strategy = trainer.strategy
    return one_rank_runs_model(strategy) or all_ranks_run_model(strategy)


def _counts(pl_module: pl.LightningModule) -> Tensor | None:
    assert isinstance(pl_module, CountsMargins)
    return pl_module.margin_counts


def _log(trainer: Trainer, pl_module: LightningModule, values: dict[str, float]) -> None:
    """To every logger now, as its steps are not those of ``log_every_n_steps``, and to monitors."""
    lightning_logged.latest_metrics(trainer).update(
        {name: torch.tensor(value, device=pl_module.device) for name, value in values.items()}
    )
    for logger in trainer.loggers:
        logger.log_metrics(values, step=lightning_logged.line_number(trainer))
