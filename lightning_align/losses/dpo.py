"""One batch of preference pairs: losses, and the metrics under TRL's names.

``preference_step`` is the part that a LightningModule shares with ``dpo_loss_from_batch``: it takes
completions that were scored already, wherever their hidden states came from.

Shapes: P pairs, B = 2 P sequences, [chosen; rejected]; T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from lightning_align._errors import argument_error, check_choice
from lightning_align.layers import find_layers
from lightning_align.losses.combined import loss_terms, weighted_sum
from lightning_align.losses.means import Mean, pairs_that_count
from lightning_align.losses.options import PreferenceArguments, PreferenceOptions
from lightning_align.losses.pair_statistics import pair_statistics
from lightning_align.losses.preference import implicit_rewards
from lightning_align.losses.reference import reference_layers
from lightning_align.losses.router import (
    experts_per_token,
    load_balancing_loss,
    no_router_error,
    router_coefficient,
)
from lightning_align.losses.scores import PairScores, pair_scores
from lightning_align.losses.sequence_logps import (
    SHARING,
    CompletionLogps,
    check_pairs,
    model_completion_logps,
)
from lightning_align.losses.unpaired import kl_of_scored, unpaired_step, with_margins


def preference_step(
    policy: CompletionLogps,
    reference: CompletionLogps | None,
    options: PreferenceOptions | None = None,
) -> tuple[Tensor, dict[str, Mean]]:
    """Losses and metrics of scored pairs.

    The metrics, detached, means over ``pairs_that_count`` unless said otherwise:

    - ``rewards/chosen``, ``rewards/rejected``: beta times the log-ratio to the reference, or to
      none what the (first) loss has as reward; ``rewards/margins`` is their difference,
      ``rewards/accuracies`` how often it is positive;
    - ``logps/chosen``, ``logps/rejected``: log-probabilities of the completions;
    - ``logits/chosen``, ``logits/rejected``: mean logit, over completion tokens and vocabulary;
    - ``entropy``: over completion tokens, in nats;
    - ``mean_token_accuracy``: share of the chosen tokens that were the likeliest;
    - ``kl/k2``: half the squared log-ratio of a token, over completion tokens. That is Schulman's
      estimator k2 of KL(policy || reference) (http://joschu.net/blog/kl-approx.html), never
      negative and zero while the models agree. It estimates the KL only for completions that the
      policy sampled; on given pairs read it as the distance moved on these texts. Absent without a
      reference;
    - ``loss/<name>``: each of several losses, before its weight;
    - what ``pair_statistics`` adds: ``logps/both_fell``, ``length/accuracy``, and as vectors
      ``length/moments`` and ``rewards/histogram``.

    Args:
        policy: Scored by the model in training, rows [chosen; rejected].
        reference: The same rows scored by the frozen reference; None if no loss asks for one.
        options: Which losses, and their constants; default DPO's.

    Returns:
        Loss of each pair, (P,), and the metrics. A loss of the whole batch (sft, aot) is that of
        each pair, or of each rank of pairs.

    Raises:
        ValueError: If a log-probability of the reference is not finite, a reference is asked for
            and missing, or the number of rows is odd.
    """
    options = options or PreferenceOptions()
    where = "preference_step"
    if options.needs_reference and reference is None:
        rule = f"must be given with loss_type={options.loss_type!r}"
        raise argument_error(where, "reference", None, rule, "Or set reference_free=True")
    compared = reference if options.needs_reference else None
    scores = pair_scores(policy, compared, where, ld_alpha=options.ld_alpha)
    terms = loss_terms(scores, options, pairs_that_count(policy))
    metrics = _metrics(policy, compared, scores, options)
    if len(terms) > 1:
        counted_P = pairs_that_count(policy)
        for name, losses_P in terms.items():
            total = (losses_P.detach() * counted_P).sum().float()
            metrics[f"loss/{name}"] = Mean(total, counted_P.sum())
    return weighted_sum(terms, options), metrics


def objective_step(
    policy: CompletionLogps,
    reference: CompletionLogps | None,
    options: PreferenceOptions,
    labels_P: Tensor | None = None,
    kl: Tensor | float = 0.0,
) -> tuple[Tensor, Tensor, dict[str, Mean]]:
    """``preference_step`` of pairs, or ``unpaired_step`` of records that have labels.

    Args:
        policy: As in either.
        reference: As in either.
        options: Which losses, and their constants; they say which of the two it is.
        labels_P: Of records.
        kl: Of records, for kto.

    Returns:
        Loss of each pair or record, (P,), which of them count in means, (P,), and the metrics.

    Raises:
        ValueError: As either.
    """
    if not options.is_unpaired:
        losses_P, metrics = preference_step(policy, reference, options)
        return losses_P, pairs_that_count(policy), metrics
    assert labels_P is not None
    losses_P, metrics = unpaired_step(policy, reference, labels_P, options, kl)
    return losses_P, policy.lengths_B > 0, metrics


@torch.no_grad()
def _metrics(
    policy: CompletionLogps,
    reference: CompletionLogps | None,
    scores: PairScores,
    options: PreferenceOptions,
) -> dict[str, Mean]:
    chosen_rewards_P, rejected_rewards_P = implicit_rewards(scores, options)
    chosen_logits_P, rejected_logits_P = policy.mean_logit_B.chunk(2)
    chosen_lengths_P, rejected_lengths_P = policy.lengths_B.chunk(2)
    num_tokens = policy.lengths_B.sum()
    num_pairs = pairs_that_count(policy).sum()  # the others add zeros to the totals

    def over_pairs(values_P: Tensor) -> Mean:
        return Mean(values_P.float().sum(), num_pairs)

    metrics = {
        "rewards/chosen": over_pairs(chosen_rewards_P),
        "rewards/rejected": over_pairs(rejected_rewards_P),
        "rewards/accuracies": over_pairs(chosen_rewards_P > rejected_rewards_P),
        "rewards/margins": over_pairs(chosen_rewards_P - rejected_rewards_P),
        "logps/chosen": over_pairs(scores.chosen.logps),
        "logps/rejected": over_pairs(scores.rejected.logps),
        "logits/chosen": Mean(chosen_logits_P.sum(), chosen_lengths_P.sum()),
        "logits/rejected": Mean(rejected_logits_P.sum(), rejected_lengths_P.sum()),
        "entropy": Mean(policy.entropy_B.sum(), num_tokens),
        "mean_token_accuracy": Mean(policy.top1_B.chunk(2)[0].sum(), chosen_lengths_P.sum()),
    }
    if reference is not None:
        token_logratios_BT = policy.token_logps_BT - reference.token_logps_BT
        metrics["kl/k2"] = Mean(token_logratios_BT.square().sum() / 2, num_tokens)
    margin_P = chosen_rewards_P - rejected_rewards_P
    return metrics | pair_statistics(scores, margin_P, pairs_that_count(policy))


def check_sharing(
    where: str, prefix_sharing: bool | str, packing: bool, options: PreferenceOptions
) -> None:
    """Refuse what cannot be had together, before any model is asked.

    Raises:
        ValueError: If single completions should share a prompt, or pairs be packed that do not.
    """
    check_choice(where, "prefix_sharing", prefix_sharing, SHARING)
    if packing and prefix_sharing is False:
        rule = "must be False with prefix_sharing=False: what is packed are rows that share"
        raise argument_error(where, "packing", packing, rule)
    for name, value in (("prefix_sharing", prefix_sharing is True), ("packing", packing)):
        if value and options.is_unpaired:
            rule = (
                f"loss_type={options.loss_type!r} is of single completions, which share no prompt"
            )
            raise argument_error(where, name, value, rule)


def dpo_loss_from_batch(
    model: nn.Module,
    ref_model: nn.Module | None,
    batch: Mapping[str, Tensor],
    *,
    chunk_size: int | None = None,
    prefix_sharing: bool | str = False,
    packing: bool = False,
    **options: Unpack[PreferenceArguments],
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean preference loss of one batch, and its metrics.

    Both models run in the mode they are in. With dropout on in either, the losses of untrained
    pairs are not log 2: call ``eval()``, or set the dropout to 0.

    Args:
        model: The policy, a decoder that ``find_layers`` can read.
        ref_model: The frozen reference, which runs without gradients; None if no loss asks for it.
        batch: ``input_ids``, ``attention_mask`` and ``completion_mask``, each (2 P, T) with rows
            [chosen; rejected], as TRL's ``DataCollatorForPreference`` makes it. For kto and
            apo_zero_unpaired (P, T), with ``label`` (P,), and for kto completions of other prompts
            in ``KL_input_ids``, ``KL_attention_mask`` and ``KL_completion_mask``.
        chunk_size: Rows whose logits exist at a time, see ``linear_logprobs``.
        prefix_sharing: Whether what both completions of a pair have in common is computed once;
            "auto" does it where it is possible and cheaper. See ``sequence_logps``.
        packing: Whether rows that share may hold several pairs, blind to each other.
        **options: Arguments of ``PreferenceOptions``: loss_type, beta, loss_weights and more.

    Returns:
        Mean loss over ``pairs_that_count``, or over records, and the means that ``preference_step``
        or ``unpaired_step`` list; ``aux_loss``, that of a router, is in the loss with its weight.

    Raises:
        ValueError: If the batch lacks a key or has an odd number of rows, the models are one
            object or share weights, the reference is missing, not finite or of another vocabulary,
            an option is outside its range, or a model cannot share though ``prefix_sharing`` is
            True.
    """
    where = "dpo_loss_from_batch"
    checked = PreferenceOptions(**options, where=where)
    check_sharing(where, prefix_sharing, packing, checked)
    if ref_model is None and checked.needs_reference:
        rule = f"must be given with loss_type={checked.loss_type!r}"
        raise argument_error(where, "ref_model", None, rule, "Or set reference_free=True")
    if ref_model is not None and checked.needs_reference:
        reference_layers(where, find_layers(model), ref_model)
    router = router_coefficient(model, checked.router_aux_loss_coef, where)
    keys = ["input_ids", "attention_mask", "completion_mask"]
    with_kl = [f"KL_{key}" for key in keys] if "kto" in checked.loss_types else []
    asked = [*keys, *["label"] * checked.is_unpaired, *with_kl]
    missing = [key for key in asked if key not in batch]
    if missing:
        raise argument_error(where, "batch", sorted(batch), f"must have the keys {missing}, too")
    sharing: dict[str, Any] = {"prefix_sharing": prefix_sharing, "packing": packing}
    if checked.is_unpaired:
        sharing = {}
    else:
        check_pairs(where, "batch['input_ids'].shape", batch["input_ids"])

    def score(of: nn.Module, keys: list[str], **wanted: Any) -> CompletionLogps:
        rows = [batch[key] for key in keys]
        return model_completion_logps(of, *rows, chunk_size=chunk_size, **sharing, **wanted)

    def score_frozen(keys: list[str]) -> CompletionLogps | None:
        with torch.no_grad():
            return score(ref_model, keys) if ref_model and checked.needs_reference else None

    router_logits: list[Tensor] | None = [] if router else None
    policy = score(model, keys, weights=checked.use_weighting, router_logits=router_logits)
    reference = score_frozen(keys)
    kl: Tensor | float = 0.0
    if with_kl:
        with torch.no_grad():
            kl = kl_of_scored(score(model, with_kl), score_frozen(with_kl))
    labels_P = batch["label"] if checked.is_unpaired else None
    losses_P, counted_P, metrics = objective_step(policy, reference, checked, labels_P, kl)
    loss = (losses_P * counted_P).sum() / counted_P.sum().clamp(min=1)
    if router and not router_logits and checked.router_aux_loss_coef:
        raise no_router_error(model, checked.router_aux_loss_coef, where)
    if router_logits:
        counted_B = counted_P if checked.is_unpaired else counted_P.repeat(2)
        mask_BT = batch["attention_mask"] * counted_B[:, None]
        aux_loss = load_balancing_loss(router_logits, experts_per_token(model), mask_BT)
        loss = loss + router * aux_loss
        metrics["aux_loss"] = Mean(aux_loss.detach(), counted_P.any())
    return loss, with_margins({name: mean.value for name, mean in metrics.items()})
