"""What objectives on a causal language model share: model, layers, exact gradient weights.

The one idea: ``training_step`` back-propagates a *sum* over tokens (or pairs) and the sum of
weights travels with the gradients (window.py); just before clipping, the gradients are divided by
the weight of the whole window (all accumulated batches, all ranks). Accumulation with unequal token
counts then equals the one big batch, where averaging per batch (Lightning's default) does not.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial, wraps
from typing import Any, TypeVar, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from transformers import PretrainedConfig
from typing_extensions import Self, override

from lightning_align._compat.lightning_quiet import prepare_loggers
from lightning_align._compat.lightning_summary import leave_out_flops
from lightning_align._compat.lightning_trainer import correct_step_value
from lightning_align._errors import argument_error
from lightning_align.layers import ModelLayers, checkpoint_blocks, find_layers
from lightning_align.layers.sharding import as_forward, is_sharded, whole_state
from lightning_align.models.adapter_config import plain_config, refuse_another_adapter
from lightning_align.models.adapters import has_adapters, only_adapter, with_adapters
from lightning_align.models.build import Loading, build_model, save_pretrained
from lightning_align.models.rotary import rotary_in_fp32
from lightning_align.modules import fully_sharded
from lightning_align.modules.batch_check import check_batch, check_data
from lightning_align.modules.continued import groups_of_an_older_run, refuse_another_model
from lightning_align.modules.window import (
    StepNotes,
    Sums,
    collect,
    log_step,
    means_over_ranks,
    take_totals,
)
from lightning_align.optimizers import param_groups
from lightning_align.optimizers.by_name import built_optimizer, optimizer_builder, scheduler_builder
from lightning_align.run import found_rate
from lightning_align.run.callbacks import callbacks_of
from lightning_align.run.exact_resume import ExactResume
from lightning_align.run.protocols import SpreadsModel, datamodule_of, tokenizer_of
from lightning_align.run.replicas import is_spread, replica, scale_gradients, total_grad_norm

_Method = TypeVar("_Method", bound=Callable[..., Any])


def with_whole_weights(method: _Method) -> _Method:
    """Of a method that runs the model and reads its head: within it, a sharded one is gathered.

    One of them must not call another one.
    """

    @wraps(method)
    def called(self: "CausalLMModule", *args: Any, **kwargs: Any) -> Any:
        return as_forward(self.model, partial(method, self, *args, **kwargs))

    return cast(_Method, called)


class CausalLMModule(pl.LightningModule, ABC):
    """Common base of the objectives; a subclass says what a batch's summed loss is.

    Args:
        model: A module, a Hugging Face name or folder, or a transformers configuration for random
            weights.
        optimizer: Builds the optimizer from named parameter groups, or its name; default
            AdamW(lr=3e-4, betas=(0.9, 0.95)).
        lr_scheduler: Builds a scheduler from the optimizer; it steps after every optimizer step,
            ReduceLROnPlateau after every epoch, by ``val_loss`` or what it monitors.
        activation_checkpointing: Whether blocks recompute their activations in backward.
        chunk_size: Rows of logits computed at a time; None picks about 24 MB worth on a CPU.
        dtype: Data type of the parameters when a model is loaded or built here.
        attn_implementation: Attention kernel by transformers' name; None leaves the choice to
            transformers.
        revision: Branch, tag or commit when the model is a hub name.
        trust_remote_code: Whether code that comes with the model may run.
        peft_config: Plain data of the adapters that the model gets, which then train alone; None
            for none but those that it has.

    Raises:
        ValueError: If ``chunk_size`` is below 1, the model cannot be loaded or read, or it cannot
            have such adapters.
    """

    loss_reduction = "sum"  # of a step's loss over its rows, for strategies that cut batches
    train_prefix = "train_"
    progress_bar_metrics: tuple[str, ...] = ("loss", "perplexity")

    def __init__(
        self,
        model: nn.Module | str | PretrainedConfig,
        optimizer: OptimizerCallable | None,
        lr_scheduler: LRSchedulerCallable | None,
        activation_checkpointing: bool,
        chunk_size: int | None,
        *,
        dtype: str = "float32",
        attn_implementation: str | None = None,
        revision: str = "main",
        trust_remote_code: bool = False,
        peft_config: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        where = type(self).__name__
        if chunk_size is not None and chunk_size < 1:
            raise argument_error(where, "chunk_size", chunk_size, "must be at least 1 row")
        # Of any model beside it, too, but for the revision, which belongs to a name.
        self.loading: Loading = {
            "dtype": dtype,
            "attn_implementation": attn_implementation,
            "revision": revision,
            "trust_remote_code": trust_remote_code,
        }
        built = build_model(model, where=where, **self.loading)
        self.model = with_adapters(built, peft_config, where=where, revision=revision)
        self.optimizer = optimizer_builder(where, optimizer)
        self.lr_scheduler = scheduler_builder(where, lr_scheduler)
        self.lr: float | None = None  # that Tuner.lr_find sets, for all groups
        self.chunk_size = chunk_size
        self.layers: ModelLayers = find_layers(self.model)
        if activation_checkpointing:
            checkpoint_blocks(self.layers)
        self._tokens_seen = torch.zeros((), dtype=torch.int64, device="cpu")
        # Sums of the open accumulation window; ExactResume saves them with the gradients. A
        # strategy that runs steps on one rank only tells both sums to the others.
        self.accumulated: dict[str, Tensor] = {}
        self.evaluated: dict[str, Tensor] = {}
        self._notes = StepNotes()
        self._saved_groups: list[dict[str, Any]] | None = None

    @property
    def tokens_seen(self) -> int:
        """Tokens learned from so far, over all ranks (for preference pairs: completion tokens)."""
        return int(self._tokens_seen)

    # The objective

    @abstractmethod
    def loss_from_hidden(self, hidden_BTD: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Sums]:
        """The summed loss of a batch, and what to log (see ``Sums``)."""

    @abstractmethod
    def model_inputs(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        """The part of a batch that ``forward_hidden`` takes."""

    @property
    def batch_keys(self) -> tuple[str, ...]:
        """What a batch must hold."""
        return ("input_ids",)

    @property
    def batch_source(self) -> str:
        """Where such batches come from, as the way out of an error."""
        return ""

    def prepared(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch as the two methods above take it.

        Raises:
            ValueError: If it lacks something of ``batch_keys``.
        """
        check_batch(type(self).__name__, batch, self.batch_keys, self.batch_source)
        return batch

    def forward_hidden(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Hidden states after the final norm, (B, T, D).

        The one place where a strategy may run the model its own way.
        """
        return self.layers.hidden_states(input_ids, position_ids, attention_mask)

    @override
    @with_whole_weights
    def forward(self, input_ids: Tensor, **inputs: Tensor) -> Tensor:
        """Logits (B, T, V), for inference."""
        return self.layers.head.logits(self.forward_hidden(input_ids, **inputs))

    # Steps

    @override
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self._step(batch, self.accumulated)

    @override
    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._step(batch, self.evaluated)

    @override
    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._step(batch, self.evaluated)

    @with_whole_weights
    def _step(self, batch: dict[str, Any], into: dict[str, Tensor]) -> Tensor:
        batch = self.prepared(batch)
        loss, sums = self.loss_from_hidden(self.forward_hidden(**self.model_inputs(batch)), batch)
        collect(sums, into)
        return loss

    @with_whole_weights
    def batch_loss(self, batch: dict[str, Any]) -> Tensor:
        """Mean loss of a batch, neither logged nor counted."""
        batch = self.prepared(batch)
        _, sums = self.loss_from_hidden(self.forward_hidden(**self.model_inputs(batch)), batch)
        total, weight = sums["loss"]
        return total / weight.clamp(min=1)

    # Exact weighting of gradients

    def gradient_factor(self) -> Tensor:
        """What the gradients of the window are multiplied by, once its last step has run.

        It undoes the means that Lightning and DDP take, and divides by the window's true weight.
        """
        _, weights = means_over_ranks(self.trainer, dict(self.accumulated))
        averaged_over = replica(self.trainer)[0] * self.trainer.accumulate_grad_batches
        return averaged_over / weights["loss"]

    @override
    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self._notes.measured = self._notes.tokens = None
        self._notes.totals = {}
        if not self.accumulated:  # a subclass's step has returned None for each batch
            return
        scale_gradients(self.trainer, self, self.gradient_factor())
        means, weights = means_over_ranks(self.trainer, self.accumulated)
        tokens = means.pop("tokens")
        self._tokens_seen = self._tokens_seen + tokens.long()  # stays on the device: no sync
        means |= self.derived_metrics(means)
        self._notes.totals = take_totals(means, weights)
        values = {"train_loss": means.pop("loss")}
        values |= {self.train_prefix + name: value for name, value in means.items()}
        values["grad_norm"] = total_grad_norm(self.trainer, self)
        values["lr"] = torch.tensor(float(optimizer.param_groups[0]["lr"]), device=self.device)
        values["tokens_seen"] = self._tokens_seen.float()
        self._notes.measured = (values["train_loss"], values["grad_norm"])
        self._notes.tokens = tokens.long()
        shown = ("train_loss", *(self.train_prefix + name for name in self.progress_bar_metrics))
        log_step(self, values, tokens, self._notes, shown)

    @property
    def measured_step(self) -> tuple[Tensor, Tensor] | None:
        """Mean loss and gradient norm of the latest window, over all ranks; None without a loss."""
        return self._notes.measured

    def forget_window(self) -> None:
        """Take back the tokens of a window whose step is about to be left out."""
        if self._notes.tokens is not None:
            self._tokens_seen = self._tokens_seen - self._notes.tokens
            self._notes.tokens = None
            correct_step_value(self, "tokens_seen", self._tokens_seen.float())

    # Logging

    def derived_metrics(self, means: dict[str, Tensor]) -> dict[str, Tensor]:  # noqa: ARG002
        """Metrics that are functions of means, such as perplexity."""
        return {}

    @override
    def on_train_epoch_start(self) -> None:
        self._notes.began = None

    @override
    def on_validation_epoch_start(self) -> None:
        self.evaluated.clear()

    @override
    def on_validation_epoch_end(self) -> None:
        self._log_evaluation("val_")
        self._notes.began = None  # a step's throughput does not count the validation before it

    @override
    def on_test_epoch_start(self) -> None:
        self.evaluated.clear()

    @override
    def on_test_epoch_end(self) -> None:
        self._log_evaluation("test_")

    def _log_evaluation(self, prefix: str) -> None:
        means, weights = means_over_ranks(self.trainer, self.evaluated)
        means.pop("tokens")
        means |= self.derived_metrics(means)
        self._notes.totals = take_totals(means, weights)
        for name, value in means.items():
            # Every rank has the mean over all ranks. Lightning's reduction would cost a message,
            # and a deadlock where one rank alone looks at the value; this way it takes none.
            shown = name in self.progress_bar_metrics
            self.log(prefix + name, value, prog_bar=shown, sync_dist=True, rank_zero_only=True)

    # Set-up

    def sharded_layers(self) -> list[ModelLayers]:
        """Maps of the models that a strategy may shard: all that a step runs."""
        return [self.layers]

    @override
    def setup(self, stage: str) -> None:
        data = datamodule_of(self.trainer)
        check_data(type(self).__name__, data, self.batch_keys, self.batch_source)
        fully_sharded.check(self)
        if is_sharded(self.model):  # by an earlier run, which has probed it
            pass
        elif not is_spread(self):
            self.layers.probe()
        elif not isinstance(self.trainer.strategy, SpreadsModel):
            rule = "its parameters are on the meta device, and the strategy does not load them"
            way_out = "Build it without empty_init, or use PipelineStrategy or ZeROInfinityStrategy"
            name = type(self.model).__name__
            raise argument_error(type(self).__name__, "model", name, rule, way_out)
        tokenizer = tokenizer_of(self.trainer)
        if tokenizer is not None and len(tokenizer) > self.layers.vocab_size:
            raise argument_error(
                type(self).__name__,
                "model",
                type(self.model).__name__,
                f"its vocabulary has {self.layers.vocab_size} rows, but the tokenizer makes ids up"
                f" to {len(tokenizer) - 1}",
                "Set the model's vocab_size to the tokenizer's, or pass the model's own tokenizer",
            )

    @override
    def configure_callbacks(self) -> Sequence[pl.Callback]:
        prepare_loggers(self.trainer)  # the only hook before they begin
        leave_out_flops(self.trainer)
        fully_sharded.prepare(self)
        present = any(isinstance(each, ExactResume) for each in callbacks_of(self.trainer))
        return [] if present else [ExactResume()]

    @override
    def configure_optimizers(self) -> Any:
        groups = self.parameter_groups()
        build: Any = self.optimizer or partial(
            torch.optim.AdamW, lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1
        )
        optimizer = built_optimizer(type(self).__name__, build, groups)
        if self._trainer is not None and found_rate.attributes_sought(self._trainer):
            found_rate.refuse_several(type(self).__name__, optimizer)
        if self.lr is not None:
            found_rate.set_rate(optimizer, self.lr)
        if self.lr_scheduler is None:
            return optimizer
        rates = param_groups.learning_rates(optimizer)
        scheduler = self.lr_scheduler(optimizer)
        param_groups.warn_of_lost_ratios(rates, optimizer, scheduler)
        when: dict[str, Any] = {"interval": "step"}
        if isinstance(scheduler, ReduceLROnPlateau):  # torch's own says nothing of what it monitors
            when = {"interval": "epoch", "monitor": getattr(scheduler, "monitor", "val_loss")}
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, **when}}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Named groups for the optimizer, which print as a table; see ``build_param_groups``.

        A run that began with other groups goes on with those: an optimizer's state fits no others.
        """
        saved, self._saved_groups = self._saved_groups, None
        parameters = {name: p for name, p in self.named_parameters() if p.requires_grad}
        names = [name for group in saved or [] for name in group["param_names"]]
        if saved is None or sorted(names) != sorted(parameters):
            return param_groups.build_param_groups(self, layers=self.layers)
        return [
            {**group, "params": [(name, parameters[name]) for name in group.pop("param_names")]}
            for group in saved
        ]

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        with rotary_in_fp32(self):
            return super()._apply(fn, recurse)  # type: ignore[no-untyped-call, no-any-return]

    # Saving

    def save_pretrained(self, folder: str) -> None:
        """Write the model, and the datamodule's tokenizer if any, as a Hugging Face folder.

        Of a model with adapters it is the folder of these, which PEFT loads. Of a sharded one every
        rank must call it, and rank 0 writes.
        """
        state = whole_state(self.model) if is_sharded(self.model) else None
        if state is None or state:  # gathered on rank 0
            save_pretrained(self.model, folder, tokenizer_of(self._trainer), state)

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["tokens_seen"] = self.tokens_seen
        if has_adapters(self.model):  # whoever reads it without the module cannot ask it
            config = only_adapter(self.model)[1]
            checkpoint["peft_config"] = plain_config(config, type(self).__name__)

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._tokens_seen.fill_(checkpoint.get("tokens_seen", 0))
        self._saved_groups = groups_of_an_older_run(self._trainer, checkpoint)
        refuse_another_model(self, self.model, checkpoint)
        if has_adapters(self.model):
            config, saved = only_adapter(self.model)[1], checkpoint.get("peft_config")
            refuse_another_adapter(config, saved, type(self).__name__)
