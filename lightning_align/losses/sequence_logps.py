"""Log-probabilities of completions: the head runs on the rows that predict one, and on no other.

Shapes: B sequences, T tokens, N completion tokens of the whole batch, D hidden size.
"""
# ruff: noqa: N815 (fields carry the shape suffix, as every tensor here does)

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_align._errors import argument_error
from lightning_align.layers import Head, find_layers
from lightning_align.losses.linear_logprobs import linear_logprobs


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
    """

    logps_B: Tensor
    lengths_B: Tensor
    entropy_B: Tensor
    mean_logit_B: Tensor
    top1_B: Tensor
    token_logps_BT: Tensor


def completion_logps(
    hidden_BTD: Tensor,
    head: Head,
    input_ids_BT: Tensor,
    completion_mask_BT: Tensor,
    *,
    chunk_size: int | None = None,
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

    Returns:
        Sums for each sequence; a sequence without completion has zeros.

    Raises:
        ValueError: If the shapes differ, or a completion token is outside the vocabulary.
    """
    where = "completion_logps"
    _check_same_shape(where, "completion_mask", completion_mask_BT, input_ids_BT)
    if hidden_BTD.shape[:2] != input_ids_BT.shape:
        rule = f"must begin with the shape of input_ids, {tuple(input_ids_BT.shape)}"
        raise argument_error(where, "hidden.shape", tuple(hidden_BTD.shape), rule)
    predicted_BT = completion_mask_BT[:, 1:].bool()
    sequence_N, position_N = predicted_BT.nonzero(as_tuple=True)
    hidden_ND = hidden_BTD[sequence_N, position_N]
    targets_N = input_ids_BT[sequence_N, position_N + 1]
    tokens = linear_logprobs(hidden_ND, head, targets_N, chunk_size=chunk_size)

    def scattered(values_N: Tensor) -> Tensor:
        # Into a rectangle and then summed: the order of the additions never changes.
        zeros_BT = torch.zeros_like(predicted_BT, dtype=tokens.logps_N.dtype)
        return zeros_BT.index_put((sequence_N, position_N), values_N.to(zeros_BT.dtype))

    token_logps_BT = scattered(tokens.logps_N)
    return CompletionLogps(
        logps_B=token_logps_BT.sum(1),
        lengths_B=predicted_BT.sum(1),
        entropy_B=scattered(tokens.entropy_N).sum(1),
        mean_logit_B=scattered(tokens.mean_logit_N).sum(1),
        top1_B=scattered(tokens.is_top1_N).sum(1),
        token_logps_BT=token_logps_BT,
    )


def sequence_logps(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    completion_mask: Tensor,
    *,
    chunk_size: int | None = None,
) -> Tensor:
    """Log-probability of each completion given its prompt.

    Args:
        model: A decoder that ``find_layers`` can read.
        input_ids: Tokens, (B, T), padded on either side.
        attention_mask: 1 for tokens, 0 for padding, (B, T).
        completion_mask: 1 for completion tokens, 0 for prompt and padding, (B, T).
        chunk_size: Rows whose logits exist at a time, see ``linear_logprobs``.

    Returns:
        Sums of token log-probabilities in nats, (B,). Differentiable.

    Raises:
        ValueError: If the shapes differ, or a completion token is padding or outside the
            vocabulary.
    """
    return model_completion_logps(
        model, input_ids, attention_mask, completion_mask, chunk_size=chunk_size
    ).logps_B


def model_completion_logps(
    model: nn.Module, *rows_BT: Tensor, chunk_size: int | None = None
) -> CompletionLogps:
    """``sequence_logps`` with everything else that is known about the completions.

    Raises:
        ValueError: As ``sequence_logps``.
    """
    where = "sequence_logps"
    input_ids, attention_mask, completion_mask = rows_BT
    _check_same_shape(where, "attention_mask", attention_mask, input_ids)
    _check_same_shape(where, "completion_mask", completion_mask, input_ids)
    if (completion_mask.bool() & ~attention_mask.bool()).any():
        rule = "must be 0 wherever attention_mask is 0"
        raise argument_error(where, "completion_mask", "...", rule, "Padding is no completion")
    layers = find_layers(model)
    hidden_BTD = layers.hidden_states(input_ids, **padding_arguments(attention_mask))
    return completion_logps(
        hidden_BTD, layers.head, input_ids, completion_mask, chunk_size=chunk_size
    )


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
