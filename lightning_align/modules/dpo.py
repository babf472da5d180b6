"""Direct preference optimisation (arXiv:2305.18290) and its relatives."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from transformers import PretrainedConfig
from typing_extensions import Self, override

from lightning_align._declared import declared
from lightning_align._errors import argument_error
from lightning_align.layers import ModelLayers
from lightning_align.layers.sharding import as_forward, is_sharded
from lightning_align.losses import (
    CompletionLogps,
    Mean,
    PreferenceOptions,
    check_sharing,
    completion_logps,
    implicit_rewards,
    kl_of_scored,
    objective_step,
    pair_scores,
    with_margins,
)
from lightning_align.models.adapter_config import plain_config
from lightning_align.models.rotary import rotary_in_fp32
from lightning_align.modules.causal_lm import CausalLMModule, with_whole_weights
from lightning_align.modules.continued import save_plain_hyperparameters
from lightning_align.modules.frozen_reference import (
    build_reference,
    check_reference_arguments,
    revision_of,
    turn_off_dropout,
)
from lightning_align.modules.pair_rows import KEYS, PairRows, by_pair, by_sequence
from lightning_align.modules.router_loss import RouterLoss
from lightning_align.modules.step_sums import sum_of_step, sums_without_steps
from lightning_align.modules.window import Sums
from lightning_align.run.protocols import batch_keys, datamodule_of
from lightning_align.run.replicas import is_spread

# Keys of completions that belong to other prompts, and what they are among the rows of a batch.
KL_KEYS = {f"KL_{name}": name for name in ("input_ids", "attention_mask", "completion_mask")}
# In the batch of a step: adds up over ranks. Who tries a batch out by itself leaves them alone.
OVER_RANKS = "KL_over_ranks"


@declared
class DPOModule(CausalLMModule):
    """Align a language model with preferences, most often against a frozen reference.

    A batch is ``input_ids``, ``attention_mask`` and ``completion_mask`` of shape (2 P, T), rows
    [chosen; rejected], as ``PreferenceDataModule`` and TRL's collator make it; for losses of
    unpaired records (P, T), with a ``label`` (P,), and for kto the completions of other prompts as
    ``KL_input_ids`` and so on. The head runs on completion tokens only, in fp32. Dropout is off in
    policy and reference, so that their ratio is 1 before the first step. The reference lives
    outside the module tree: no checkpoint keys, no parameters, still moved and cast with the
    module; losses that need none get none.

    What the two completions of a pair have in common, the prompt, is computed once, where that is
    possible and cheaper: they stand in one row and do not see each other. Losses and gradients are
    those of separate rows. ``layout`` says how the latest batch ran: separate, shared or packed.

    Logs ``train_loss`` and TRL's names: ``rewards/chosen``, ``rewards/rejected``,
    ``rewards/accuracies``, ``rewards/margins``, ``logps/*``, ``logits/*``, ``entropy``,
    ``mean_token_accuracy``; besides ``logps/both_fell``, ``length/accuracy``,
    ``length/correlation``, ``kl/k2``, ``loss/*`` of several losses, ``aux_loss`` of a mixture of
    experts, ``tokens_seen`` (completion tokens), ``tokens_per_second``, ``grad_norm`` and ``lr``;
    in validation all with ``val_`` before.

    Args:
        model: A module, a Hugging Face name or folder, or a transformers configuration for random
            weights.
        ref_model: The reference, likewise; None freezes a copy of the model as it is now.
        beta: Strength of the pull to the reference; IPO's tau, ORPO's lambda.
        loss_type: sigmoid (DPO) or another loss of docs/dpo.md, or a list of them.
        label_smoothing: Probability that a preference is the wrong way round, for losses that
            smooth.
        optimizer: Builds the optimizer from named parameter groups, or its name; default
            AdamW(lr=3e-4, betas=(0.9, 0.95)).
        lr_scheduler: Builds a scheduler from the optimizer; it steps after every optimizer step,
            ReduceLROnPlateau after every epoch, by ``val_loss`` or what it monitors.
        chunk_size: Rows of logits computed at a time; None picks about 24 MB worth on a CPU.
        activation_checkpointing: Whether blocks recompute their activations in backward.
        dtype: Data type of the parameters when a model is loaded or built here.
        attn_implementation: Attention kernel by transformers' name; None leaves the choice to
            transformers.
        revision: Branch, tag or commit when the model is a hub name.
        trust_remote_code: Whether code that comes with the model may run.
        loss_weights: Weight of each loss of a list; None for 1 each.
        f_divergence_type: What is held small between policy and reference, reverse_kl, forward_kl,
            js_divergence or alpha_divergence.
        f_alpha_divergence_coef: Alpha of alpha_divergence; 1 is reverse_kl.
        ld_alpha: Weight of the tokens by which a completion is longer than the other one of its
            pair (LD-DPO), in [0, 1]; None for 1.
        length_alpha: Added to the margin of rewards for each token that the chosen completion is
            longer than the rejected one (R-DPO).
        use_weighting: Whether to weigh each pair by the probability of both completions (WPO).
        reference_free: Whether to train without a reference, as if it found all completions alike.
        discopop_tau: Temperature of discopop's mixture.
        simpo_gamma: Margin of rewards that simpo and alphapo want.
        alphapo_alpha: Shape of alphapo's reward, (1 - p^-alpha) / alpha.
        sft_mean: Of sft, the mean over all chosen tokens of a batch, as in TRL, or over pairs of
            each one's own mean, which accumulates exactly.
        desirable_weight: Weight of records whose label is true, for kto and apo_zero_unpaired.
        undesirable_weight: Weight of the other records.
        router_aux_loss_coef: Weight of the load-balancing loss of a mixture of experts; None for
            what the model's configuration says.
        prefix_sharing: Whether a pair is one row, in which the prompt is computed once; "auto"
            decides for each batch by what costs less.
        packing: Whether a row may hold several pairs, which do not see each other.
        precompute_ref_log_probs: Whether the reference runs once over all data before training,
            and is then released; what it says is kept for later runs.
        ref_cache_dir: Folder of what references have said, local or at any fsspec URL; default a
            folder in $LIGHTNING_ALIGN_CACHE, or else in ~/.cache/lightning_align.
        peft_config: Adapters of PEFT that alone train, such as peft.LoraConfig(r=16), or in YAML
            its class_path and init_args; the reference is then the model without them, held once.
        sync_ref_model: Whether the reference follows the model (TR-DPO).
        ref_model_mixup_alpha: How much of the model it then takes on, in (0, 1].
        ref_model_sync_steps: Optimizer steps from one time to the next.
        ref_model_revision: Branch, tag or commit when the reference is a hub name; None for that of
            the model where both have one name, and else main.

    Raises:
        ValueError: If a value is out of its range or would do nothing, a model cannot be loaded or
            read, or the two models have different vocabularies, are one object or share weights; in
            ``setup``, if a model cannot share though ``prefix_sharing`` is True.

    Example:
        >>> from transformers import LlamaConfig
        >>> module = DPOModule(LlamaConfig(vocab_size=512, hidden_size=64, num_hidden_layers=2))
    """

    train_prefix = ""  # TRL's names have none
    progress_bar_metrics = ("loss", "rewards/accuracies", "rewards/margins")

    def __init__(
        self,
        model: nn.Module | str | PretrainedConfig,
        ref_model: nn.Module | str | PretrainedConfig | None = None,
        beta: float = 0.1,
        loss_type: str | list[str] = "sigmoid",
        label_smoothing: float = 0.0,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        chunk_size: int | None = None,
        activation_checkpointing: bool = False,
        dtype: str = "float32",
        attn_implementation: str | None = None,
        revision: str = "main",
        trust_remote_code: bool = False,
        *,
        loss_weights: list[float] | None = None,
        f_divergence_type: str = "reverse_kl",
        f_alpha_divergence_coef: float = 0.5,
        ld_alpha: float | None = None,
        length_alpha: float = 0.0,
        use_weighting: bool = False,
        reference_free: bool = False,
        discopop_tau: float = 0.05,
        simpo_gamma: float = 0.5,
        alphapo_alpha: float = 0.25,
        sft_mean: str = "tokens",
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
        router_aux_loss_coef: float | None = None,
        prefix_sharing: bool | str = "auto",
        packing: bool = False,
        precompute_ref_log_probs: bool = False,
        ref_cache_dir: str | None = None,
        peft_config: dict[str, Any] | Any | None = None,
        sync_ref_model: bool = False,
        ref_model_mixup_alpha: float = 0.6,
        ref_model_sync_steps: int = 512,
        ref_model_revision: str | None = None,
    ) -> None:
        options = PreferenceOptions(
            loss_type,
            beta,
            label_smoothing,
            loss_weights=loss_weights,
            f_divergence_type=f_divergence_type,
            f_alpha_divergence_coef=f_alpha_divergence_coef,
            ld_alpha=ld_alpha,
            length_alpha=length_alpha,
            use_weighting=use_weighting,
            reference_free=reference_free,
            discopop_tau=discopop_tau,
            simpo_gamma=simpo_gamma,
            alphapo_alpha=alphapo_alpha,
            sft_mean=sft_mean,
            desirable_weight=desirable_weight,
            undesirable_weight=undesirable_weight,
            router_aux_loss_coef=router_aux_loss_coef,
            where="DPOModule",
        )
        options.refuse_idle("DPOModule")
        check_sharing("DPOModule", prefix_sharing, packing, options)
        asked_of = options, ref_model, precompute_ref_log_probs, ref_cache_dir
        check_reference_arguments("DPOModule", *asked_of)
        peft_config = plain_config(peft_config, "DPOModule")
        asked = ref_model, ref_model_revision, model, revision
        its_revision = revision_of("DPOModule", *asked)
        super().__init__(
            model,
            optimizer,
            lr_scheduler,
            activation_checkpointing,
            chunk_size,
            dtype=dtype,
            attn_implementation=attn_implementation,
            revision=revision,
            trust_remote_code=trust_remote_code,
            peft_config=peft_config,
        )
        save_plain_hyperparameters(self, model=model, ref_model=ref_model)
        self.options = options
        self.layout = "separate"
        self._rows = PairRows("DPOModule", prefix_sharing, packing)
        self._router = RouterLoss("DPOModule", self.model, router_aux_loss_coef)
        turn_off_dropout(self.model)
        self._reference = build_reference(
            "DPOModule",
            self.layers,
            ref_model,
            {**self.loading, "revision": its_revision},
            needs_reference=options.needs_reference,
            precompute=precompute_ref_log_probs,
            cache_dir=ref_cache_dir,
            sync=(sync_ref_model, ref_model_mixup_alpha, ref_model_sync_steps),
        )

    # The reference, for strategies

    @property
    def reference_layers(self) -> ModelLayers | None:
        """What runs as the reference, a frozen model or the policy without adapters, if any."""
        return self._reference.layers

    def frozen_modules(self) -> dict[str, nn.Module]:
        """Modules outside the module tree that take part in a step, for strategies."""
        layers = self.reference_layers
        is_beside = layers is not None and not self._reference.lacks_adapters
        return {"reference": layers.model} if layers is not None and is_beside else {}

    @override
    def sharded_layers(self) -> list[ModelLayers]:
        layers = self.reference_layers if self.frozen_modules() else None
        return [self.layers] if layers is None else [self.layers, layers]

    def frozen_copies(self) -> dict[str, str]:
        """A reference that begins as a copy of the model, for strategies that bring values."""
        return {"reference": "model"} if self._reference.is_copy else {}

    def frozen_modules_filled(self) -> None:
        """Take the fingerprint of the reference, which had no values yet."""
        for reference in self.frozen_modules().values():
            self._reference.know(reference)

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        for reference in self.frozen_modules().values():
            with rotary_in_fp32(reference):
                reference._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    # Set-up

    @property
    @override
    def batch_keys(self) -> tuple[str, ...]:
        kl_keys = tuple(KL_KEYS) if "kto" in self.options.loss_types else ()
        return (*KEYS, *["label"] * self.options.is_unpaired, *kl_keys)

    @property
    @override
    def batch_source(self) -> str:
        if self.options.is_unpaired:
            return "Give PreferenceDataModule a file with the columns prompt, completion and label"
        return "Give it PreferenceDataModule with chosen and rejected, or batches like its own"

    @override
    def setup(self, stage: str) -> None:
        super().setup(stage)
        self._refuse_other_records()
        is_set_up = is_sharded(self.model)  # an earlier run has sharded it, too
        if not is_spread(self) and not is_set_up:
            self._router.set_up(self.layers)
        self._reference.set_up(self)
        if not self.options.is_unpaired and not is_set_up:
            beside = None if self._reference.cached else self.reference_layers
            self._rows.set_up(self.layers, beside)
        parts = self.trainer.accumulate_grad_batches
        if self._coupled != ["kto"]:
            parts *= self.trainer.world_size
        if stage == "fit" and self._coupled and parts > 1:
            of_all = ", the KL of kto of that of all ranks," * ("kto" in self._coupled)
            rank_zero_info(
                f"DPOModule(loss_type={self.options.loss_type!r}): {' and '.join(self._coupled)} of"
                " a batch depends on all of its pairs together. It is taken of each micro-batch on"
                f" each rank alone{of_all} as TRL does, so it is not that of the one big batch."
            )

    @property
    def _coupled(self) -> list[str]:
        """Terms of the loss that are no sum over the pairs of a batch."""
        return self.options.coupled_losses + ["aux_loss"] * bool(self._router.coefficient)

    def _refuse_other_records(self) -> None:
        data = datamodule_of(self.trainer)
        if "label" in (batch_keys(data) or ()) and not self.options.is_unpaired:
            rule = "is a loss of pairs, and the data are unpaired records, with a label each"
            way_out = "Use kto or apo_zero_unpaired, or give a file with chosen and rejected"
            raise argument_error("DPOModule", "loss_type", self.options.loss_type, rule, way_out)
        if "kto" in self.options.loss_types and getattr(data, "batch_size", None) == 1:
            rule = "estimates a KL from completions of other records, and a batch has one record"
            way_out = "Set batch_size to 2 or more, or use 'apo_zero_unpaired'"
            raise argument_error("DPOModule", "loss_type", "kto", rule, way_out)

    @override
    def on_fit_start(self) -> None:
        self._reference.precompute(self)

    @override
    def on_validation_start(self) -> None:
        self._reference.precompute(self)

    @override
    def on_test_start(self) -> None:
        self._reference.precompute(self)

    @override
    def on_predict_start(self) -> None:
        self._reference.precompute(self)

    @override
    def on_validation_epoch_end(self) -> None:
        self._sums_of_others()
        super().on_validation_epoch_end()

    @override
    def on_test_epoch_end(self) -> None:
        self._sums_of_others()
        super().on_test_epoch_end()

    def _sums_of_others(self) -> None:
        """Until no rank has a batch left, for a step's KL is a sum over all ranks."""
        if "kto" in self.options.loss_types:
            sums_without_steps(self.trainer, 2, self.device)

    # Pipelines

    @property
    def pipeline_refusal(self) -> str | None:
        """Why no pipeline can train it as it is, and what could be."""
        if self._coupled:
            return (
                f"{' and '.join(self._coupled)} of a batch depends on all of its pairs together."
                " Losses that are sums over pairs train, sft with sft_mean='pairs' among them, and"
                " a mixture of experts with router_aux_loss_coef=0"
            )
        if self.reference_layers is not None:
            return (
                "its reference would have to run beside it. It trains with a loss that needs none,"
                " or with precompute_ref_log_probs=True, once the cache has been filled on one"
                " device or with DDP"
            )
        if self._rows.packing:
            return "packed rows cannot be cut between pairs. It trains with packing=False"
        return None

    def pipeline_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch so that each row is a pair, laid out as a whole: rows of one width."""
        return batch if self.options.is_unpaired else by_pair(self.prepared(batch))

    # The step

    @override
    def prepared(self, batch: dict[str, Any]) -> dict[str, Any]:
        """With the ``layout`` of its pairs, None for separate rows.

        Raises:
            ValueError: If it lacks something, or is of records where the loss is of pairs.
        """
        if isinstance(batch, Mapping) and ("label" in batch) != self.options.is_unpaired:
            kind = "unpaired records, with a 'label'" if self.options.is_unpaired else "pairs"
            rule = f"is a loss of {kind}; the batch has {sorted(batch)}"
            raise argument_error("DPOModule", "loss_type", self.options.loss_type, rule)
        super().prepared(batch)
        if self.options.is_unpaired:
            return batch
        if batch["input_ids"].ndim == 3:  # of ``pipeline_batch``, or a part of it
            return by_sequence(batch)
        layout = self._rows.of(batch, self.layers.hidden_size)
        self.layout = "separate" if layout is None else layout.name
        return {**batch, "layout": layout}

    @override
    def model_inputs(self, batch: dict[str, Any]) -> dict[str, Any]:
        return self._rows.inputs(batch, self.layers)

    @override
    def forward_hidden(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """As in every module; the router of a mixture of experts is heard, too, for its loss."""
        inputs = input_ids, position_ids, attention_mask
        if not self._router.coefficient:
            return super().forward_hidden(*inputs)
        return self._router.hidden_states(self.layers, *inputs)

    @override
    def forward(self, input_ids: Tensor, **inputs: Tensor) -> Tensor:
        logits_BTV = super().forward(input_ids, **inputs)
        self._router.forget()
        return logits_BTV

    def score(
        self, hidden_BTD: Tensor, batch: dict[str, Any]
    ) -> tuple[CompletionLogps, CompletionLogps | None]:
        """Completions of a prepared batch under (policy, reference)."""
        of_batch = partial(
            completion_logps,
            input_ids_BT=batch["input_ids"],
            completion_mask_BT=batch["completion_mask"],
            chunk_size=self.chunk_size,
            layout=batch.get("layout"),
        )
        policy = of_batch(hidden_BTD, self.layers.head, weights=self.options.use_weighting)
        if self._reference.cached is not None:
            self._reference.precompute(self)  # whoever tries a step before training finds none
            return policy, self._reference.cached.scored(batch)
        layers = self.reference_layers
        if layers is None:
            return policy, None

        def frozen() -> CompletionLogps:
            inputs = self._rows.inputs(batch, layers, of_reference=True)
            frozen_BTD = layers.hidden_states(inputs.pop("input_ids"), **inputs)
            return of_batch(frozen_BTD, layers.head, statistics=False)

        with torch.no_grad(), self._reference.asked(self.model):
            if self._reference.lacks_adapters:  # the policy, which is gathered already
                return policy, frozen()
            return policy, as_forward(layers.model, frozen)

    @override
    def loss_from_hidden(self, hidden_BTD: Tensor, batch: dict[str, Any]) -> tuple[Tensor, Sums]:
        policy, reference = self.score(hidden_BTD, batch)
        kl = self._kl(batch) if "kto" in self.options.loss_types else 0.0
        scored = policy, reference, self.options
        losses_P, counted_P, metrics = objective_step(*scored, batch.get("label"), kl)
        loss, num_pairs = (losses_P * counted_P).sum(), counted_P.sum()
        if self._router.coefficient and not self._router.is_heard:
            self._router.go_without(self.model)
        if self._router.coefficient:
            counted_B = counted_P if self.options.is_unpaired else counted_P.repeat(2)
            aux_loss = self._router.take(self.layers, batch, counted_B)
            loss = loss + self._router.coefficient * aux_loss * num_pairs
            metrics["aux_loss"] = Mean(aux_loss.detach() * num_pairs, num_pairs)
        sums: Sums = {name: (mean.total, mean.count) for name, mean in metrics.items()}
        sums["loss"] = (loss, num_pairs)
        sums["tokens"] = (policy.lengths_B.sum(), torch.ones_like(num_pairs))
        return loss, sums

    @override
    def _step(self, batch: dict[str, Any], into: dict[str, Tensor]) -> Tensor:
        if "kto" in self.options.loss_types and self._trainer is not None:
            batch = {**batch, OVER_RANKS: partial(sum_of_step, self._trainer)}
        return super()._step(batch, into)

    @torch.no_grad()
    def _kl(self, batch: dict[str, Any]) -> Tensor:
        """KTO's estimate, from completions that belong to other prompts of the batch."""
        others = {name: batch[key] for key, name in KL_KEYS.items()}
        hidden_BTD = super().forward_hidden(**self.model_inputs(others))  # no router has a say here
        return kl_of_scored(*self.score(hidden_BTD, others), batch.get(OVER_RANKS))

    @override
    def optimizer_step(self, *args: Any, **options: Any) -> None:
        super().optimizer_step(*args, **options)
        # The Trainer counts this step afterwards; with accumulation it is called for each alone.
        self._reference.follow(self.model, self.trainer.global_step + 1)

    @override
    def derived_metrics(self, means: dict[str, Tensor]) -> dict[str, Tensor]:
        return with_margins(means)

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        self._reference.save(checkpoint)

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self._reference.load(checkpoint, self.model)

    @property
    def reference_refusal(self) -> str | None:
        """Why the reference cannot be asked about other texts than those of the data."""
        if not self.options.needs_reference:
            return f"it has no reference with loss_type={self.options.loss_type!r}"
        released = self._reference.cached is not None
        return "its reference is released once it is precomputed" if released else None

    @contextmanager
    def as_reference(self) -> Iterator[nn.Module]:
        """The language model that says what the reference says."""
        assert self.reference_layers is not None
        with self._reference.asked(self.model):
            yield self.reference_layers.model

    @property
    def margin_counts(self) -> Tensor | None:
        """Pairs of the latest window, or evaluation, between ``losses.margin_edges``."""
        return self._notes.totals.get("rewards/histogram")

    @with_whole_weights
    def score_pairs(self, batch: dict[str, Any]) -> tuple[CompletionLogps, CompletionLogps | None]:
        """Completions of a batch under (policy, reference); nothing else comes of it."""
        batch = self.prepared(batch)
        return self.score(super().forward_hidden(**self.model_inputs(batch)), batch)

    @override
    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Implicit rewards (P, 2) of the chosen and the rejected completion of each pair.

        Of unpaired records (P,), one a record.
        """
        policy, reference = self.score_pairs(batch)
        if self.options.is_unpaired:
            frozen_P = 0 if reference is None else reference.logps_B
            return self.options.beta * (policy.logps_B - frozen_P)
        scores = pair_scores(policy, reference, "DPOModule", ld_alpha=self.options.ld_alpha)
        return torch.stack(implicit_rewards(scores, self.options), dim=1)
