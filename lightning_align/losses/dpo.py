"""One batch of preference pairs: losses, and the metrics under TRL's names.

``preference_step`` is the part that a LightningModule shares with ``dpo_loss_from_batch``: it takes
completions that were scored already, wherever their hidden states came from.

Shapes: P pairs, B = 2 P sequences, [chosen; rejected]; T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_align._errors import argument_error
from lightning_align.losses.options import PreferenceOptions
from lightning_align.losses.preference import pair_losses
from lightning_align.losses.scores import PairScores, check_pairs, pair_scores
from lightning_align.losses.sequence_logps import CompletionLogps, model_completion_logps


@dataclass(frozen=True, eq=False)
class Mean:
    """A mean that can still be merged: over batches and ranks, add totals and add counts.

    Attributes:
        total: Sum of the values, in fp32.
        count: Number of values: pairs or tokens.
    """

    total: Tensor
    count: Tensor

    @property
    def value(self) -> Tensor:
        """The mean; 0 of nothing."""
        return self.total / self.count.clamp(min=1)


def pairs_that_count(policy: CompletionLogps) -> Tensor:
    """Which pairs are in losses and metrics: (P,), True where either side has a completion token.

    A pair without any is what a sampler fills up the last batch of a rank with. One with an empty
    side is a preference all the same, and TRL counts it: its log-ratio on that side is 0.

    Args:
        policy: Scored completions, rows [chosen; rejected].
    """
    chosen_lengths_P, rejected_lengths_P = policy.lengths_B.chunk(2)
    return (chosen_lengths_P > 0) | (rejected_lengths_P > 0)


def preference_step(
    policy: CompletionLogps,
    reference: CompletionLogps,
    options: PreferenceOptions | None = None,
) -> tuple[Tensor, dict[str, Mean]]:
    """Losses and metrics of scored pairs.

    The metrics, detached, means over ``pairs_that_count`` unless said otherwise:

    - ``rewards/chosen``, ``rewards/rejected``: beta times the log-ratio to the reference;
      ``rewards/margins`` is their difference, ``rewards/accuracies`` how often it is positive;
    - ``logps/chosen``, ``logps/rejected``: log-probabilities of the completions;
    - ``logits/chosen``, ``logits/rejected``: mean logit, over completion tokens and vocabulary;
    - ``entropy``: over completion tokens, in nats;
    - ``mean_token_accuracy``: share of the chosen tokens that were the likeliest;
    - ``kl/k2``: half the squared log-ratio of a token, over completion tokens. That is Schulman's
      estimator k2 of KL(policy || reference) (http://joschu.net/blog/kl-approx.html), never
      negative and zero while the models agree. It estimates the KL only for completions that the
      policy sampled; on given pairs read it as the distance moved on these texts.

    Args:
        policy: Scored by the model in training, rows [chosen; rejected].
        reference: The same rows scored by the frozen reference.
        options: Which loss, and its constants; default DPO's. ``ipo`` gets the lengths, as in TRL.

    Returns:
        Loss of each pair, (P,), and the metrics.

    Raises:
        ValueError: If a log-probability of the reference is not finite, or the number of rows is
            odd.
    """
    options = options or PreferenceOptions()
    scores = pair_scores(policy, reference, "preference_step")
    return pair_losses(scores, options), _metrics(policy, reference, scores, options.beta)


@torch.no_grad()
def _metrics(
    policy: CompletionLogps, reference: CompletionLogps, scores: PairScores, beta: float
) -> dict[str, Mean]:
    chosen_rewards_P = beta * scores.chosen.logratios
    rejected_rewards_P = beta * scores.rejected.logratios
    chosen_logits_P, rejected_logits_P = policy.mean_logit_B.chunk(2)
    chosen_lengths_P, rejected_lengths_P = policy.lengths_B.chunk(2)
    token_logratios_BT = policy.token_logps_BT - reference.token_logps_BT
    num_tokens = policy.lengths_B.sum()
    num_pairs = pairs_that_count(policy).sum()  # the others add zeros to the totals

    def over_pairs(values_P: Tensor) -> Mean:
        return Mean(values_P.float().sum(), num_pairs)

    return {
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
        "kl/k2": Mean(token_logratios_BT.square().sum() / 2, num_tokens),
    }


def dpo_loss_from_batch(
    model: nn.Module,
    ref_model: nn.Module,
    batch: Mapping[str, Tensor],
    *,
    loss_type: str = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    chunk_size: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean preference loss of one batch, and its metrics.

    Both models run in the mode they are in. With dropout on in either, the losses of untrained
    pairs are not log 2: call ``eval()``, or set the dropout to 0.

    Args:
        model: The policy, a decoder that ``find_layers`` can read.
        ref_model: The frozen reference, which runs without gradients.
        batch: ``input_ids``, ``attention_mask`` and ``completion_mask``, each (2 P, T) with rows
            [chosen; rejected], as TRL's ``DataCollatorForPreference`` makes it.
        loss_type: A name in ``LOSSES``: cdpo, hinge, ipo or sigmoid.
        beta: Strength of the pull to the reference; IPO's tau.
        label_smoothing: Probability that a preference is the wrong way round, for cdpo.
        chunk_size: Rows whose logits exist at a time, see ``linear_logprobs``.

    Returns:
        Mean loss over ``pairs_that_count``, and the means that ``preference_step`` lists.

    Raises:
        ValueError: If the batch lacks a key or has an odd number of rows, the models are one
            object, the reference is not finite, or an option is outside its range.
    """
    where = "dpo_loss_from_batch"
    options = PreferenceOptions(loss_type, beta, label_smoothing, where)
    if ref_model is model:
        rule = "must be another object than model: it stays what it is while model learns"
        raise argument_error(where, "ref_model", "model", rule, "Use copy.deepcopy(model)")
    keys = ("input_ids", "attention_mask", "completion_mask")
    missing = [key for key in keys if key not in batch]
    if missing:
        raise argument_error(where, "batch", sorted(batch), f"must have the keys {missing}, too")
    rows = tuple(batch[key] for key in keys)
    check_pairs(where, "batch['input_ids'].shape", rows[0])
    with torch.no_grad():
        reference = model_completion_logps(ref_model, *rows, chunk_size=chunk_size)
    policy = model_completion_logps(model, *rows, chunk_size=chunk_size)
    losses_P, metrics = preference_step(policy, reference, options)
    counted_P = pairs_that_count(policy)
    loss = (losses_P * counted_P).sum() / counted_P.sum().clamp(min=1)
    return loss, {name: mean.value for name, mean in metrics.items()}
