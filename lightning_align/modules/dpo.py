"""Direct preference optimisation (arXiv:2305.18290) and its relatives."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from transformers import PretrainedConfig
from typing_extensions import Self, override

from lightning_align._errors import argument_error
from lightning_align.layers import ModelLayers, find_layers
from lightning_align.losses import (
    CompletionLogps,
    PreferenceOptions,
    completion_logps,
    padding_arguments,
    pairs_that_count,
    preference_step,
)
from lightning_align.models.build import Loading, build_model
from lightning_align.models.rotary import rotary_in_fp32
from lightning_align.modules.causal_lm import CausalLMModule
from lightning_align.modules.continued import save_plain_hyperparameters
from lightning_align.modules.reference import fingerprint, fingerprint_until_0_1
from lightning_align.modules.window import Sums
from lightning_align.run.replicas import is_spread


class DPOModule(CausalLMModule):
    """Align a language model with preference pairs against a frozen reference.

    A batch is ``input_ids``, ``attention_mask`` and ``completion_mask`` of shape (2 P, T), rows
    [chosen; rejected], as ``PreferenceDataModule`` and TRL's collator make it. The head runs on
    completion tokens only, in fp32. Dropout is off in policy and reference, so that their ratio is
    1 before the first step. The reference lives outside the module tree: no checkpoint keys, no
    parameters, still moved and cast with the module.

    Logs ``train_loss`` and TRL's names: ``rewards/chosen``, ``rewards/rejected``,
    ``rewards/accuracies``, ``rewards/margins``, ``logps/*``, ``logits/*``, ``entropy``,
    ``mean_token_accuracy``; besides ``kl/k2``, ``tokens_seen`` (completion tokens),
    ``tokens_per_second``, ``grad_norm`` and ``lr``; in validation all with ``val_`` before.

    Args:
        model: A module, a Hugging Face name or folder, or a transformers configuration for random
            weights.
        ref_model: The reference, likewise; None freezes a copy of the model as it is now.
        beta: Strength of the pull to the reference; IPO's tau.
        loss_type: sigmoid (DPO), hinge (SLiC), ipo or cdpo.
        label_smoothing: Probability that a preference is the wrong way round, for cdpo.
        optimizer: Builds the optimizer from named parameter groups; default AdamW(lr=3e-4,
            betas=(0.9, 0.95)).
        lr_scheduler: Builds a scheduler from the optimizer; it steps after every optimizer step.
        chunk_size: Rows of logits computed at a time; None picks about 24 MB worth on a CPU.
        activation_checkpointing: Whether blocks recompute their activations in backward.
        dtype: Data type of the parameters when a model is loaded or built here.
        attn_implementation: Attention kernel by transformers' name; None leaves the choice to
            transformers.
        revision: Branch, tag or commit when the model is a hub name.
        trust_remote_code: Whether code that comes with the model may run.

    Raises:
        ValueError: If a value is out of its range, a model cannot be loaded or read, or the two
            models have different vocabularies or are one object.

    Example:
        >>> from transformers import LlamaConfig
        >>> module = DPOModule(LlamaConfig(vocab_size=512, hidden_size=64, num_hidden_layers=2))
    """

    train_prefix = ""  # TRL's names have none
    _saved_reference: dict[str, str] = {}  # noqa: RUF012 - replaced, and never changed
    progress_bar_metrics = ("loss", "rewards/accuracies")
    pipeline_refusal = "its rows are pairs, which micro-batches would tear apart"

    def __init__(
        self,
        model: nn.Module | str | PretrainedConfig,
        ref_model: nn.Module | str | PretrainedConfig | None = None,
        beta: float = 0.1,
        loss_type: str = "sigmoid",
        label_smoothing: float = 0.0,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        chunk_size: int | None = None,
        activation_checkpointing: bool = False,
        dtype: str = "float32",
        attn_implementation: str | None = None,
        revision: str = "main",
        trust_remote_code: bool = False,
    ) -> None:
        options = PreferenceOptions(loss_type, beta, label_smoothing, where="DPOModule")
        both: Loading = {"dtype": dtype, "attn_implementation": attn_implementation}
        both["trust_remote_code"] = trust_remote_code
        loading: Loading = {**both, "revision": revision}
        super().__init__(
            model, optimizer, lr_scheduler, activation_checkpointing, chunk_size, loading
        )
        save_plain_hyperparameters(self, model=model, ref_model=ref_model)
        self.options = options
        turn_off_dropout(self.model)
        self._reference_is_copy = ref_model is None
        if ref_model is None:
            reference = copy.deepcopy(self.model)
        else:
            reference = build_model(ref_model, where="DPOModule", argument="ref_model", **both)
        self._adopt_reference(reference)

    def _adopt_reference(self, reference: nn.Module) -> None:
        if reference is self.model:
            rule = "must be another object than model: it stays what it is while model learns"
            way_out = "Leave ref_model out to freeze a copy"
            raise argument_error("DPOModule", "ref_model", "model", rule, way_out)
        turn_off_dropout(reference)
        reference.eval().requires_grad_(False)
        layers = find_layers(reference)
        if layers.vocab_size != self.layers.vocab_size:
            rule = (
                f"its vocabulary has {layers.vocab_size} rows and that of model"
                f" {self.layers.vocab_size}; they must be the same"
            )
            raise argument_error("DPOModule", "ref_model", type(reference).__name__, rule)
        # nn.Module.__setattr__ registers modules; a ModelLayers is none, so this stays outside.
        self.reference_layers: ModelLayers = layers
        self.frozen_modules_filled()

    def frozen_modules(self) -> dict[str, nn.Module]:
        """Modules outside the module tree that take part in a step, for strategies."""
        return {"reference": self.reference_layers.model}

    def frozen_copies(self) -> dict[str, str]:
        """A reference that begins as a copy of the model, for strategies that bring values."""
        return {"reference": "model"} if self._reference_is_copy else {}

    def frozen_modules_filled(self) -> None:
        """Take the fingerprint of the reference, unless it has no values yet."""
        reference = self.reference_layers.model
        # Now, before a strategy casts it: a checkpoint tells whether the reference is the same.
        self._reference_fingerprint = fingerprint(reference)
        self._reference_dtypes = {parameter.dtype for parameter in reference.parameters()}
        self._check_reference()

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        with rotary_in_fp32(self.reference_layers.model):
            self.reference_layers.model._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    @override
    def model_inputs(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"input_ids": batch["input_ids"], **padding_arguments(batch["attention_mask"])}

    def score(self, hidden_BTD: Tensor, batch: dict[str, Tensor]) -> tuple[CompletionLogps, ...]:
        """Completions of a batch under (policy, reference)."""
        rows = batch["input_ids"], batch["completion_mask"]
        policy = completion_logps(hidden_BTD, self.layers.head, *rows, chunk_size=self.chunk_size)
        with torch.no_grad():
            layers, inputs = self.reference_layers, self.model_inputs(batch)
            frozen_BTD = layers.hidden_states(inputs.pop("input_ids"), **inputs)
            reference = completion_logps(frozen_BTD, layers.head, *rows, chunk_size=self.chunk_size)
        return policy, reference

    @override
    def loss_from_hidden(self, hidden_BTD: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Sums]:
        policy, reference = self.score(hidden_BTD, batch)
        losses_P, metrics = preference_step(policy, reference, self.options)
        counted_P = pairs_that_count(policy)
        loss, num_pairs = (losses_P * counted_P).sum(), counted_P.sum()
        sums: Sums = {name: (mean.total, mean.count) for name, mean in metrics.items()}
        sums["loss"] = (loss, num_pairs)
        sums["tokens"] = (policy.lengths_B.sum(), torch.ones_like(num_pairs))
        return loss, sums

    @override
    def setup(self, stage: str) -> None:
        super().setup(stage)
        if not is_spread(self.reference_layers.model):
            self.reference_layers.probe()

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["reference"] = self._reference_fingerprint

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        saved = checkpoint.get("reference")
        if isinstance(saved, str):
            self._check_older_reference(saved)
        else:
            self._saved_reference = saved or {}
            self._check_reference()

    def _check_reference(self) -> None:
        """Refuse a reference that is not the checkpoint's, as soon as both are known."""
        saved, ours = self._saved_reference, self._reference_fingerprint
        if saved and ours and saved != ours:
            what = " and ".join(name for name in ours if saved.get(name) != ours[name])
            raise self._reference_error(f"another reference, which differs in its {what}")

    def _check_older_reference(self, saved: str) -> None:
        """An older version's hash tells most other weights apart, unless these were cast since."""
        reference = self.reference_layers.model
        is_cast = {p.dtype for p in reference.parameters()} != self._reference_dtypes
        if saved and not is_cast and saved != fingerprint_until_0_1(reference):
            raise self._reference_error("another reference")
        warnings.warn(
            "the checkpoint is of an older version, which knew little of its reference: whether"
            " this is the model that training began with cannot be told for certain",
            stacklevel=2,
        )

    def _reference_error(self, what: str) -> ValueError:
        rule = f"the checkpoint was trained against {what}"
        way_out = "Pass the model that training began with as ref_model"
        name = type(self.reference_layers.model).__name__
        return argument_error("DPOModule", "ref_model", name, rule, way_out)

    @override
    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Implicit rewards (P, 2) of the chosen and the rejected completion of each pair."""
        hidden_BTD = self.forward_hidden(**self.model_inputs(batch))
        policy, reference = self.score(hidden_BTD, batch)
        rewards_B = self.options.beta * (policy.logps_B - reference.logps_B)
        return torch.stack(rewards_B.chunk(2), dim=1)


def turn_off_dropout(model: nn.Module) -> None:
    """Set every dropout probability to 0, also those that attention kernels are called with."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)
