"""Direct preference optimisation (arXiv:2305.18290) and its relatives."""

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import (
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
)
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from transformers import PretrainedConfig
from typing_extensions import Self, override

from lightning_align._errors import argument_error
from lightning_align.data.reference_cache import Values
from lightning_align.data.token_cache import default_cache_dir
from lightning_align.layers import ModelLayers, find_layers
from lightning_align.losses import (
    CompletionLogps,
    Mean,
    PairAttention,
    PairLayout,
    PreferenceOptions,
    check_pair_attention,
    check_sharing,
    completion_logps,
    experts_per_token,
    implicit_rewards,
    kl_of_scored,
    load_balancing_loss,
    no_router_error,
    padding_arguments,
    pair_layout,
    pair_scores,
    pairs_that_count,
    preference_step,
    router_coefficient,
    unpaired_step,
    with_margins,
)
from lightning_align.models.build import Loading, build_model
from lightning_align.models.rotary import rotary_in_fp32
from lightning_align.modules.causal_lm import CausalLMModule
from lightning_align.modules.continued import save_plain_hyperparameters
from lightning_align.modules.precomputed import (
    PrecomputedReference,
    Row,
    evaluating,
    score_rows,
)
from lightning_align.modules.reference import fingerprint, fingerprint_until_0_1
from lightning_align.modules.window import Sums
from lightning_align.run.protocols import NumbersCompletions, SpreadsModel, datamodule_of
from lightning_align.run.replicas import is_spread

# Keys of completions that belong to other prompts, and what they are among the rows of a batch.
KL_KEYS = {f"KL_{name}": name for name in ("input_ids", "attention_mask", "completion_mask")}


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
    ``mean_token_accuracy``; besides ``kl/k2``, ``loss/*`` of several losses, ``aux_loss`` of a
    mixture of experts, ``tokens_seen`` (completion tokens), ``tokens_per_second``, ``grad_norm``
    and ``lr``; in validation all with ``val_`` before.

    Args:
        model: A module, a Hugging Face name or folder, or a transformers configuration for random
            weights.
        ref_model: The reference, likewise; None freezes a copy of the model as it is now.
        beta: Strength of the pull to the reference; IPO's tau, ORPO's lambda.
        loss_type: sigmoid (DPO) or another loss of docs/dpo.md, or a list of them.
        label_smoothing: Probability that a preference is the wrong way round, for losses that
            smooth.
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

    Raises:
        ValueError: If a value is out of its range or would do nothing, a model cannot be loaded or
            read, or the two models have different vocabularies or are one object; in
            ``setup``, if a model cannot share though ``prefix_sharing`` is True.

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
        both: Loading = {"dtype": dtype, "attn_implementation": attn_implementation}
        both["trust_remote_code"] = trust_remote_code
        loading: Loading = {**both, "revision": revision}
        super().__init__(
            model, optimizer, lr_scheduler, activation_checkpointing, chunk_size, loading
        )
        save_plain_hyperparameters(self, model=model, ref_model=ref_model)
        self.options = options
        self.prefix_sharing, self.packing = prefix_sharing, packing
        self.layout = "separate"
        # What policy and reference must be told about rows of pairs; nothing if those are separate.
        self._pair_attention: list[PairAttention] = []
        self._laid_out: tuple[Tensor, PairLayout | None] | None = None
        self.router_coefficient = router_coefficient(self.model, router_aux_loss_coef, "DPOModule")
        self._router_logits: list[Tensor] = []
        turn_off_dropout(self.model)
        self._precomputed = self._to_precompute(precompute_ref_log_probs, ref_cache_dir)
        own_values = self._precomputed is not None and ref_model is None
        self._reference_is_copy = ref_model is None and options.needs_reference and not own_values
        self._policy_is_reference = own_values  # as long as it has not learned
        self.reference_layers: ModelLayers | None = None
        if not options.needs_reference:
            self._refuse_reference(ref_model)
        elif own_values:
            self._know_reference(self.model)
        elif ref_model is None:
            self._adopt_reference(copy.deepcopy(self.model))
        else:
            build = partial(build_model, where="DPOModule", argument="ref_model")
            self._adopt_reference(build(ref_model, **both))

    def _refuse_reference(self, ref_model: object) -> None:
        self._reference_fingerprint: dict[str, str] = {}
        if ref_model is not None:
            rule = f"must be None with loss_type={self.options.loss_type!r}, which needs none"
            if self.options.reference_free:
                rule = "must be None with reference_free=True"
            raise argument_error("DPOModule", "ref_model", type(ref_model).__name__, rule)

    def _to_precompute(self, wanted: bool, url: str | None) -> PrecomputedReference | None:
        where, argument = "DPOModule", "precompute_ref_log_probs"
        if not wanted:
            if url is not None:
                rule = f"serves {argument}=True alone"
                raise argument_error(where, "ref_cache_dir", url, rule)
            return None
        if not self.options.needs_reference:
            rule = f"does nothing with loss_type={self.options.loss_type!r}, which needs none"
            if self.options.reference_free:
                rule = "does nothing with reference_free=True"
            raise argument_error(where, argument, True, rule)
        if "kto" in self.options.loss_types:
            rule = (
                "does not go with 'kto', whose KL is estimated from completions that are drawn"
                " anew for each batch"
            )
            raise argument_error(where, argument, True, rule, "Use 'apo_zero_unpaired'")
        return PrecomputedReference(where, url or str(default_cache_dir() / "reference"))

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
        self.reference_layers = layers
        self.frozen_modules_filled()

    def frozen_modules(self) -> dict[str, nn.Module]:
        """Modules outside the module tree that take part in a step, for strategies."""
        layers = self.reference_layers
        return {} if layers is None else {"reference": layers.model}

    def frozen_copies(self) -> dict[str, str]:
        """A reference that begins as a copy of the model, for strategies that bring values."""
        return {"reference": "model"} if self._reference_is_copy else {}

    def frozen_modules_filled(self) -> None:
        """Take the fingerprint of the reference, unless it has no values yet."""
        for reference in self.frozen_modules().values():
            self._know_reference(reference)

    def _know_reference(self, reference: nn.Module) -> None:
        # Now, before a strategy casts it: a checkpoint tells whether the reference is the same.
        self._reference_fingerprint = fingerprint(reference)
        self._reference_dtypes = {parameter.dtype for parameter in reference.parameters()}
        self._check_reference()

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        for reference in self.frozen_modules().values():
            with rotary_in_fp32(reference):
                reference._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    @override
    def setup(self, stage: str) -> None:
        super().setup(stage)
        if self._precomputed is None:  # else only if it is to run at all
            self._probe_reference()
        self._refuse_single_records()
        self._check_router()
        self._set_up_sharing()
        if self._precomputed is not None:
            self._check_precompute()
        coupled = self.options.coupled_losses + ["aux_loss"] * bool(self.router_coefficient)
        parts = self.trainer.accumulate_grad_batches * self.trainer.world_size
        if stage == "fit" and coupled and parts > 1:
            rank_zero_info(
                f"DPOModule(loss_type={self.options.loss_type!r}): {' and '.join(coupled)} of a"
                " batch depends on all of its pairs together. It is taken of each micro-batch on"
                " each rank alone, as TRL does, so it is not that of the one big batch."
            )

    def _probe_reference(self) -> None:
        if self.reference_layers is not None and not is_spread(self.reference_layers.model):
            self.reference_layers.probe()

    def _refuse_single_records(self) -> None:
        data = datamodule_of(self.trainer)
        if "kto" in self.options.loss_types and getattr(data, "batch_size", None) == 1:
            rule = "estimates a KL from completions of other records, and a batch has one record"
            way_out = "Set batch_size to 2 or more, or use 'apo_zero_unpaired'"
            raise argument_error("DPOModule", "loss_type", "kto", rule, way_out)

    def _check_router(self) -> None:
        """A weight that the user gave must weigh something; one of a configuration may not."""
        if not self.router_coefficient or is_spread(self) or self.layers.gives_router_logits():
            return
        if self.options.router_aux_loss_coef is not None:
            raise no_router_error(self.model, self.router_coefficient, "DPOModule")
        rank_zero_warn(
            f"DPOModule(model={type(self.model).__name__!r}): its configuration has a weight for"
            " the load-balancing loss, and it gives no router logits. It trains without that loss."
        )
        self.router_coefficient = 0.0

    def _set_up_sharing(self) -> None:
        self._pair_attention, self._laid_out = [], None
        if self.prefix_sharing is False or self.options.is_unpaired:
            return
        models = [self.layers]
        if self.reference_layers is not None and self._precomputed is None:
            models.append(self.reference_layers)
        try:
            self._pair_attention = [check_pair_attention(layers) for layers in models]
        except ValueError as reason:
            if self.prefix_sharing is True:
                rule = f"this model cannot do it. {reason}"
                way_out = "Set prefix_sharing='auto' or False"
                raise argument_error("DPOModule", "prefix_sharing", True, rule, way_out) from reason
            rank_zero_warn(f"DPOModule computes the prompt of a pair twice. {reason}")

    # The reference before training

    def _check_precompute(self) -> None:
        where, argument = "DPOModule", "precompute_ref_log_probs"
        if not isinstance(datamodule_of(self.trainer), NumbersCompletions):
            rule = (
                "needs to know all data before training, and the number of each sample in a batch"
            )
            way_out = (
                "Give trainer.fit a datamodule: PreferenceDataModule, or one with completions()"
            )
            raise argument_error(where, argument, True, rule, way_out)
        strategy = self.trainer.strategy
        sharded = (DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy)
        if isinstance(strategy, (SpreadsModel, *sharded)):
            rule = f"does not go with {type(strategy).__name__}, which spreads the models"
            way_out = "Fill the cache on one device or with DDP, or leave the argument out"
            raise argument_error(where, argument, True, rule, way_out)
        if self._policy_is_reference:  # also where weights were loaded since
            self._policy_is_reference = fingerprint(self.model) == self._reference_fingerprint

    @override
    def on_fit_start(self) -> None:
        self._precompute()

    @override
    def on_validation_start(self) -> None:
        self._precompute()

    @override
    def on_test_start(self) -> None:
        self._precompute()

    @override
    def on_predict_start(self) -> None:
        self._precompute()

    def _precompute(self) -> None:
        """Have the reference's values of this run's data, and let the reference go. Collective."""
        values, data = self._precomputed, datamodule_of(self._trainer)
        if values is None or values.is_of(data):
            return
        about = {**self._reference_fingerprint, "precision": str(self.trainer.precision)}
        values.fill(self.trainer, data, about, self._probe_reference, self._score_reference)
        self.reference_layers = None

    def _score_reference(self, rows: Sequence[Row]) -> list[Values]:
        layers = self.reference_layers or (self.layers if self._policy_is_reference else None)
        if layers is None:
            assert self._precomputed is not None
            rule = (
                f"{self._precomputed.url} lacks values of the reference, which is no longer at"
                " hand: it was released, or was the policy, which has moved on"
            )
            way_out = (
                "Pass the model that training began with as ref_model, or bring the cache back"
            )
            raise argument_error("DPOModule", "ref_model", None, rule, way_out)
        precision = self.trainer.strategy.precision_plugin
        batch_size = 2 * getattr(datamodule_of(self.trainer), "batch_size", 4)
        with evaluating(layers.model), precision.forward_context():
            return score_rows(
                layers,
                rows,
                batch_size=batch_size,
                chunk_size=self.chunk_size,
                device=self.device,
                where="DPOModule",
            )

    # The step

    @override
    def model_inputs(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        return self._inputs(batch, self.layers, *self._pair_attention[:1])

    def _inputs(
        self, batch: dict[str, Tensor], layers: ModelLayers, attention: PairAttention | None = None
    ) -> dict[str, Any]:
        layout = self._layout_of(batch)
        if layout is None or attention is None:
            return {"input_ids": batch["input_ids"], **padding_arguments(batch["attention_mask"])}
        return attention.arguments(layout, layers.head.weight.dtype)

    def _layout_of(self, batch: dict[str, Tensor]) -> PairLayout | None:
        """Rows of the pairs of a batch, None for separate ones; kept until the batch is scored."""
        if not self._pair_attention:
            return None
        rows = [batch[key] for key in ("input_ids", "attention_mask", "completion_mask")]
        if self._laid_out is None or self._laid_out[0] is not rows[0]:
            layout = pair_layout(
                *rows,
                packing=self.packing,
                hidden_size=self.layers.hidden_size,
                only_if_cheaper=self.prefix_sharing == "auto",
            )
            self._laid_out = rows[0], layout
            self.layout = "separate" if layout is None else layout.name
        return self._laid_out[1]

    @override
    def forward_hidden(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """As in every module; the router of a mixture of experts is heard, too, for its loss."""
        inputs = input_ids, position_ids, attention_mask
        if not self.router_coefficient:
            return super().forward_hidden(*inputs)
        heard = self.layers.hidden_states_and_router_logits(*inputs)
        hidden_BTD, self._router_logits = heard
        return hidden_BTD

    @override
    def forward(self, input_ids: Tensor, **inputs: Tensor) -> Tensor:
        logits_BTV = super().forward(input_ids, **inputs)
        self._router_logits = []  # attributes are saved, and hold memory
        return logits_BTV

    def score(
        self, hidden_BTD: Tensor, batch: dict[str, Tensor]
    ) -> tuple[CompletionLogps, CompletionLogps | None]:
        """Completions of a batch under (policy, reference)."""
        chunk_size, rows = self.chunk_size, (batch["input_ids"], batch["completion_mask"])
        layout = self._layout_of(batch)
        policy = completion_logps(
            hidden_BTD,
            self.layers.head,
            *rows,
            chunk_size=chunk_size,
            weights=self.options.use_weighting,
            layout=layout,
        )
        if self._precomputed is not None:
            self._laid_out = None
            self._precompute()  # whoever tries a step before training begins finds none
            return policy, self._precomputed.scored(batch)
        if self.reference_layers is None:
            self._laid_out = None
            return policy, None
        with torch.no_grad():
            layers = self.reference_layers
            inputs = self._inputs(batch, layers, *self._pair_attention[1:])
            self._laid_out = None
            frozen_BTD = layers.hidden_states(inputs.pop("input_ids"), **inputs)
            return policy, completion_logps(
                frozen_BTD, layers.head, *rows, chunk_size=chunk_size, layout=layout
            )

    @override
    def loss_from_hidden(self, hidden_BTD: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Sums]:
        if ("label" in batch) != self.options.is_unpaired:
            kind = "unpaired records, with a 'label'" if self.options.is_unpaired else "pairs"
            rule = f"is a loss of {kind}; the batch has {sorted(batch)}"
            raise argument_error("DPOModule", "loss_type", self.options.loss_type, rule)
        router_logits, self._router_logits = self._router_logits, []
        layout = self._layout_of(batch)
        if layout is not None:  # as in separate rows: what is shared counts for both sequences
            router_logits = [of_places[layout.index_BT.flatten()] for of_places in router_logits]
        policy, reference = self.score(hidden_BTD, batch)
        if self.options.is_unpaired:
            kl = self._kl(batch) if "kto" in self.options.loss_types else 0.0
            step = unpaired_step(policy, reference, batch["label"], self.options, kl)
            counted_P = counted_B = policy.lengths_B > 0
        else:
            step = preference_step(policy, reference, self.options)
            counted_P = pairs_that_count(policy)
            counted_B = counted_P.repeat(2)
        losses_P, metrics = step
        loss, num_pairs = (losses_P * counted_P).sum(), counted_P.sum()
        if router_logits:
            mask_BT = batch["attention_mask"] * counted_B[:, None]
            aux_loss = load_balancing_loss(router_logits, experts_per_token(self.model), mask_BT)
            loss = loss + self.router_coefficient * aux_loss * num_pairs
            metrics["aux_loss"] = Mean(aux_loss.detach() * num_pairs, num_pairs)
        sums: Sums = {name: (mean.total, mean.count) for name, mean in metrics.items()}
        sums["loss"] = (loss, num_pairs)
        sums["tokens"] = (policy.lengths_B.sum(), torch.ones_like(num_pairs))
        return loss, sums

    @torch.no_grad()
    def _kl(self, batch: dict[str, Tensor]) -> Tensor:
        """KTO's estimate, from completions that belong to other prompts of the batch."""
        missing = [key for key in KL_KEYS if key not in batch]
        if missing:
            rule = f"needs the keys {missing} in a batch; it has {sorted(batch)}"
            raise argument_error("DPOModule", "loss_type", "kto", rule)
        others = {name: batch[key] for key, name in KL_KEYS.items()}
        hidden_BTD = super().forward_hidden(**self.model_inputs(others))  # no router has a say here
        return kl_of_scored(*self.score(hidden_BTD, others))

    @override
    def derived_metrics(self, means: dict[str, Tensor]) -> dict[str, Tensor]:
        return with_margins(means)

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["reference"] = self._reference_fingerprint

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        saved = checkpoint.get("reference")
        own = {"reference": self.model} if self._policy_is_reference else {}
        self._policy_is_reference &= not checkpoint.get("global_step", 0)
        if isinstance(saved, str):
            self._check_older_reference(saved, {**self.frozen_modules(), **own})
        else:
            self._saved_reference = saved or {}
            self._check_reference()

    def _check_reference(self) -> None:
        """Refuse a reference that is not the checkpoint's, as soon as both are known."""
        saved, ours = self._saved_reference, self._reference_fingerprint
        if saved and ours and saved != ours:
            what = " and ".join(name for name in ours if saved.get(name) != ours[name])
            raise self._reference_error(f"another reference, which differs in its {what}")

    def _check_older_reference(self, saved: str, references: Mapping[str, nn.Module]) -> None:
        """An older version's hash tells most other weights apart, unless these were cast since."""
        for reference in references.values():
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
        layers = self.reference_layers
        name = None if layers is None else type(layers.model).__name__
        return argument_error("DPOModule", "ref_model", name, rule, way_out)

    @override
    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Implicit rewards (P, 2) of the chosen and the rejected completion of each pair.

        Of unpaired records (P,), one a record.
        """
        hidden_BTD = super().forward_hidden(**self.model_inputs(batch))
        policy, reference = self.score(hidden_BTD, batch)
        if self.options.is_unpaired:
            frozen_P = 0 if reference is None else reference.logps_B
            return self.options.beta * (policy.logps_B - frozen_P)
        scores = pair_scores(policy, reference, "DPOModule", ld_alpha=self.options.ld_alpha)
        return torch.stack(implicit_rewards(scores, self.options), dim=1)


def turn_off_dropout(model: nn.Module) -> None:
    """Set every dropout probability to 0, also those that attention kernels are called with."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)
