"""Log-probabilities of completions: the head runs on the rows that predict one, and on no other.

Shapes: B sequences, T tokens, N completion tokens of the whole batch, D hidden size.
"""
# ruff: noqa: N815 (fields carry the shape suffix, as every tensor here does)

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_align._errors import argument_error, check_choice
from lightning_align.layers import Head, ModelLayers, find_layers
from lightning_align.losses.linear_logprobs import linear_logprobs
from lightning_align.losses.pair_attention import check_pair_attention
from lightning_align.losses.pair_layout import PairLayout, lay_out_pairs


class CompletionLogps(NamedTuple):
    """Sums over the completion tokens of each sequence; only log-probabilities keep gradients.

    Attributes:
        logps_B: Log-probability of the completion given its prompt, in nats. Differentiable.
        lengths_B: Completion tokens that were predicted.
        entropy_B: Sum of the entropies, in nats.
        mean_logit_B: Sum of each token's mean logit over the vocabulary.
        top1_B: Completion tokens that were the likeliest.
        token_logps_BT: Log-probability of each token, (B, T - 1): entry t is of token t + 1, zero
            outside the completion. Differentiable.
        completion_BT: Which of these entries are of completion tokens, (B, T - 1); None where
            only sums are known.
        log_weights_B: Mean over the completion tokens of log p - log(sum of all p squared), the
            logarithm of WPO's weight; None where it was not asked for.
    """

    logps_B: Tensor
    lengths_B: Tensor
    entropy_B: Tensor
    mean_logit_B: Tensor
    top1_B: Tensor
    token_logps_BT: Tensor
    completion_BT: Tensor | None = None
    log_weights_B: Tensor | None = None


def completion_logps(
    hidden_BTD: Tensor,
    head: Head,
    input_ids_BT: Tensor,
    completion_mask_BT: Tensor,
    *,
    chunk_size: int | None = None,
    weights: bool = False,
    layout: PairLayout | None = None,
    statistics: bool = True,
) -> CompletionLogps:
    """Log-probabilities of completions from hidden states.

    The hidden state of token t predicts token t + 1. A completion token at position 0 has nothing
    that predicts it and does not count.

    Args:
        hidden_BTD: Hidden states after the final norm.
        head: Output projection (V, D), with its bias, scale and softcap.
        input_ids_BT: Prompt, completion and padding, in the order the model saw them.
        completion_mask_BT: 1 for completion tokens, 0 for prompt and padding.
        chunk_size: Rows whose logits exist at a time, see ``linear_logprobs``.
        weights: Whether ``log_weights_B`` is wanted, which costs one more sum over the logits.
        layout: Of the rows that the hidden states are of, (R, L, D); None for those of the batch.
        statistics: Whether entropies, mean logits and likeliest tokens are wanted, as of a policy;
            nan otherwise.

    Returns:
        Sums for each sequence; a sequence without completion has zeros.

    Raises:
        ValueError: If the shapes differ, or a completion token is outside the vocabulary.
    """
    where = "completion_logps"
    _check_same_shape(where, "completion_mask", completion_mask_BT, input_ids_BT)
    rows = input_ids_BT if layout is None else layout.input_ids_RL
    if hidden_BTD.shape[:2] != rows.shape:
        rule = f"must begin with the shape of input_ids, {tuple(rows.shape)}"
        raise argument_error(where, "hidden.shape", tuple(hidden_BTD.shape), rule)
    predicted_BT = completion_mask_BT[:, 1:].bool()
    sequence_N, position_N = predicted_BT.nonzero(as_tuple=True)
    if layout is None:
        hidden_ND = hidden_BTD[sequence_N, position_N]
    else:
        hidden_ND = hidden_BTD.flatten(0, 1)[layout.index_BT[sequence_N, position_N]]
    targets_N = input_ids_BT[sequence_N, position_N + 1]
    wanted = {"collision": weights, "statistics": statistics}
    tokens = linear_logprobs(hidden_ND, head, targets_N, chunk_size=chunk_size, **wanted)

    def scattered(values_N: Tensor) -> Tensor:
        # Into a rectangle and then summed: the order of the additions never changes.
        zeros_BT = torch.zeros_like(predicted_BT, dtype=tokens.logps_N.dtype)
        return zeros_BT.index_put((sequence_N, position_N), values_N.to(zeros_BT.dtype))

    token_logps_BT = scattered(tokens.logps_N)
    lengths_B = predicted_BT.sum(1)
    log_weights_B = None
    if tokens.log_collision_N is not None:
        aligned_N = tokens.logps_N.detach() - tokens.log_collision_N
        log_weights_B = scattered(aligned_N).sum(1) / lengths_B.clamp(min=1)
    return CompletionLogps(
        logps_B=token_logps_BT.sum(1),
        lengths_B=lengths_B,
        entropy_B=scattered(tokens.entropy_N).sum(1),
        mean_logit_B=scattered(tokens.mean_logit_N).sum(1),
        top1_B=scattered(tokens.is_top1_N if statistics else tokens.entropy_N).sum(1),  # nan, too
        token_logps_BT=token_logps_BT,
        completion_BT=predicted_BT,
        log_weights_B=log_weights_B,
    )


def sequence_logps(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    completion_mask: Tensor,
    *,
    prefix_sharing: bool | str = False,
    chunk_size: int | None = None,
    ld_alpha: float | None = None,
) -> Tensor:
    """Log-probability of each completion given its prompt.

    Args:
        model: A decoder that ``find_layers`` can read.
        input_ids: Tokens, (B, T), padded on either side.
        attention_mask: 1 for tokens, 0 for padding, (B, T).
        completion_mask: 1 for completion tokens, 0 for prompt and padding, (B, T).
        prefix_sharing: Whether rows are [chosen; rejected] and what both completions of a pair have
            in common is computed once, which is exact; "auto" does it where it is possible and
            cheaper. The model is tried on a few tokens in each call.
        chunk_size: Rows whose logits exist at a time, see ``linear_logprobs``.
        ld_alpha: Weight, in [0, 1], of the tokens by which a completion is longer than the other
            one of its pair; rows are then [chosen; rejected]. None for 1.

    Returns:
        Sums of token log-probabilities in nats, (B,). Differentiable.

    Raises:
        ValueError: If the shapes differ, a completion token is padding or outside the vocabulary,
            rows with an ``ld_alpha`` or ``prefix_sharing=True`` are no pairs, or this model cannot
            share.
    """
    rows = input_ids, attention_mask, completion_mask
    scored = model_completion_logps(
        model, *rows, chunk_size=chunk_size, prefix_sharing=prefix_sharing
    )
    if ld_alpha is None:
        return scored.logps_B
    if not 0 <= ld_alpha <= 1:
        raise argument_error("sequence_logps", "ld_alpha", ld_alpha, "must be None or in [0, 1]")
    return length_desensitized(scored, ld_alpha)


def length_desensitized(scored: CompletionLogps, ld_alpha: float) -> Tensor:
    """LD-DPO's log-probabilities of completions (Liu et al., arXiv:2409.06411), (B,).

    A completion's tokens up to the length of the other one count in full, those beyond it
    ``ld_alpha``: a pair no longer prefers length only because longer texts move further.

    Args:
        scored: Rows [chosen; rejected].
        ld_alpha: 1 changes nothing, 0 cuts the longer completion.

    Raises:
        ValueError: If the rows are no pairs, or only their sums are known.
    """
    lengths_B, completion_BT = scored.lengths_B, scored.completion_BT
    check_pairs("length_desensitized", "lengths_B.shape", lengths_B)
    if completion_BT is None:
        rule = "must be known where tokens have weights of their own"
        raise argument_error("length_desensitized", "completion_BT", None, rule)
    shared_P = torch.minimum(*lengths_B.chunk(2))
    place_BT = completion_BT.long().cumsum(1)  # 1 for the first token of the completion
    is_beyond_BT = place_BT > torch.cat([shared_P, shared_P])[:, None]
    return torch.where(is_beyond_BT, ld_alpha * scored.token_logps_BT, scored.token_logps_BT).sum(1)


def check_pairs(where: str, name: str, rows: Tensor) -> None:
    """Refuse rows that are not [chosen; rejected].

    Raises:
        ValueError: If their number is odd, or there are none.
    """
    if len(rows) == 0 or len(rows) % 2:
        rule = "the number of rows must be even and not 0: [chosen; rejected]"
        raise argument_error(where, name, tuple(rows.shape), rule)


def model_completion_logps(
    model: nn.Module,
    *rows_BT: Tensor,
    chunk_size: int | None = None,
    weights: bool = False,
    router_logits: list[Tensor] | None = None,
    prefix_sharing: bool | str = False,
    packing: bool = False,
) -> CompletionLogps:
    """``sequence_logps`` with everything else that is known about the completions.

    Args:
        model: As there.
        *rows_BT: ``input_ids``, ``attention_mask`` and ``completion_mask``.
        chunk_size: As there.
        weights: Whether ``log_weights_B`` is wanted.
        router_logits: Gets those of a mixture of experts, which it must then be; a place that
            tokens of both sequences share is there twice, as in separate rows.
        prefix_sharing: As there.
        packing: Whether rows that share may hold several pairs.

    Raises:
        ValueError: As ``sequence_logps``.
    """
    input_ids, attention_mask, completion_mask = rows_BT
    check_masks("sequence_logps", *rows_BT)
    layers = find_layers(model)
    layout, arguments = None, {"input_ids": input_ids, **padding_arguments(attention_mask)}
    if prefix_sharing:
        layout, shared = _shared(layers, rows_BT, prefix_sharing, packing)
        arguments = shared or arguments
    tokens = arguments.pop("input_ids")
    if router_logits is None:
        hidden = layers.hidden_states(tokens, **arguments)
    else:
        hidden, logits = layers.hidden_states_and_router_logits(tokens, **arguments)
        if layout is not None:
            logits = [of_places[layout.index_BT.flatten()] for of_places in logits]
        router_logits.extend(logits)
    return completion_logps(
        hidden,
        layers.head,
        input_ids,
        completion_mask,
        chunk_size=chunk_size,
        weights=weights,
        layout=layout,
    )


def _shared(
    layers: ModelLayers, rows_BT: tuple[Tensor, ...], prefix_sharing: bool | str, packing: bool
) -> tuple[PairLayout | None, dict[str, Any]]:
    """Layout and arguments of the model; nothing if "auto" finds separate rows better."""
    where, is_auto = "sequence_logps", prefix_sharing == "auto"
    check_choice(where, "prefix_sharing", prefix_sharing, SHARING)
    try:
        check_pairs(where, "input_ids.shape", rows_BT[0])
        attention = check_pair_attention(layers)
    except ValueError:
        if is_auto:
            return None, {}
        raise
    layout = pair_layout(
        *rows_BT,
        packing=packing,
        hidden_size=layers.hidden_size,
        only_if_cheaper=is_auto,
        pairs_alone=attention.pairs_alone,
    )
    if layout is None:
        return None, {}
    return layout, attention.arguments(layout, layers.head.weight.dtype)


SHARING = ("auto", True, False)  # choices of prefix_sharing


def pair_layout(
    input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor, **options: Any
) -> PairLayout | None:
    """``lay_out_pairs`` of a batch, or None if it must not be laid out.

    In a row nothing stands before a sequence. Where a completion begins behind padding, separate
    rows predict its first token from there.
    """
    from_padding_BT = completion_mask[:, 1:].bool() & ~attention_mask[:, :-1].bool()
    if from_padding_BT.any():
        return None
    return lay_out_pairs(input_ids, attention_mask, **options)


def check_masks(
    where: str, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor
) -> None:
    """Refuse masks that are not of these tokens.

    Raises:
        ValueError: If the shapes differ, or a completion token is padding.
    """
    _check_same_shape(where, "attention_mask", attention_mask, input_ids)
    _check_same_shape(where, "completion_mask", completion_mask, input_ids)
    if (completion_mask.bool() & ~attention_mask.bool()).any():
        rule = "must be 0 wherever attention_mask is 0"
        raise argument_error(where, "completion_mask", "...", rule, "Padding is no completion")


def padding_arguments(attention_mask_BT: Tensor) -> dict[str, Tensor]:
    """What a causal decoder must be told about the padding.

    Nothing if it is all on the right: no token looks there, and without a mask attention can use
    its causal kernels. Otherwise the mask, and positions that count from the first real token
    (absolute ones, as GPT-2 has, would begin with the padding).
    """
    mask_BT = attention_mask_BT.long()
    if not (mask_BT.diff(dim=1) > 0).any():
        return {}
    positions_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)
    return {"attention_mask": mask_BT, "position_ids": positions_BT}


def _check_same_shape(where: str, name: str, mask_BT: Tensor, input_ids_BT: Tensor) -> None:
    if mask_BT.shape != input_ids_BT.shape:
        rule = f"must be the shape of input_ids, {tuple(input_ids_BT.shape)}"
        raise argument_error(where, f"{name}.shape", tuple(mask_BT.shape), rule)
