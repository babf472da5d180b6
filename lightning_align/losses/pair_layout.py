"""Pairs in rows [shared, chosen, rejected]: what two completions have in common is computed once.

A completion sees the tokens that it begins with, and never the other completion. Positions are
those of each sequence alone, so the model cannot tell a row from two (Wang and Hegde,
arXiv:2410.20305). What is shared is the longest common beginning of both sequences: the prompt,
and the tokens by which both completions begin. Nothing has to be known of prompts, and pairs whose
prompts differ share less.

Several pairs may be packed into a row, blind to each other.

Shapes: P pairs, B = 2 P sequences, [chosen; rejected], of T tokens; R rows of L places.
"""
# ruff: noqa: N815 (fields carry the shape suffix, as every tensor here does)

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_align._errors import argument_error

# Multiplications of a token of width D: 12 D^2 with the weights of a block (attention 4 D^2, MLP
# 8 D^2) and 2 D with each token that it is compared with. So one comparison is worth 1 / (6 D).
_COMPARISONS_PER_WIDTH = 6


class PairLayout(NamedTuple):
    """Where each token of a batch of pairs stands in rows.

    Attributes:
        input_ids_RL: Tokens; 0 where there is none.
        position_ids_RL: Place of each token in its own sequence, from 0.
        pair_RL: Number of the pair; -1 where there is no token.
        part_RL: 0 for tokens of both sequences, 1 of the chosen, 2 of the rejected one alone.
        index_BT: Where each token of the batch is in the flattened rows, ``row * L + place``; of
            padding anywhere.
    """

    input_ids_RL: Tensor
    position_ids_RL: Tensor
    pair_RL: Tensor
    part_RL: Tensor
    index_BT: Tensor

    @property
    def name(self) -> str:
        """``packed`` if any row has several pairs, otherwise ``shared``."""
        return "shared" if len(self.input_ids_RL) == len(self.index_BT) // 2 else "packed"

    def visible(self, window: int | None = None) -> Tensor:
        """Which place sees which: (R, 1, L, L), the former in rows.

        A place without a token sees itself, so that its softmax is defined, and nobody sees it.

        Args:
            window: How many positions a token sees, itself included; None for all.
        """
        places = torch.arange(self.pair_RL.shape[1], device=self.pair_RL.device)
        return sees(self, window, slice(None), places[:, None], places[None])[:, None]


def sees(
    layout: PairLayout, window: int | None, rows: Tensor | slice, query: Tensor, key: Tensor
) -> Tensor:
    """Whether the place ``query`` sees the place ``key``, for any indices that go together.

    A window is counted in positions: between the last shared token and the first of the rejected
    completion are all chosen ones, and no position.
    """
    pair, part, position = (
        of_RL[rows] for of_RL in (layout.pair_RL, layout.part_RL, layout.position_ids_RL)
    )
    distance = position[..., query] - position[..., key]
    seen = (pair[..., query] == pair[..., key]) & (pair[..., key] >= 0) & (distance >= 0)
    seen = seen & ((part[..., key] == 0) | (part[..., key] == part[..., query]))
    if window is not None:
        seen = seen & (distance < window)
    return seen | (query == key)


def lay_out_pairs(
    input_ids_BT: Tensor,
    attention_mask_BT: Tensor,
    *,
    packing: bool = False,
    hidden_size: int | None = None,
    only_if_cheaper: bool = False,
    pairs_alone: bool = False,
) -> PairLayout | None:
    """Rows for a batch of pairs. One number of each pair is read on the host, nothing else.

    Args:
        input_ids_BT: Sequences [chosen; rejected], padded anywhere.
        attention_mask_BT: 1 for tokens, 0 for padding.
        packing: Whether a row may hold several pairs. How many rows is what costs least: more
            fill better, and fewer compare less tokens with each other.
        hidden_size: Width of the model, which says what a comparison costs.
        only_if_cheaper: Whether to give none where the sequences, each in a row of its own, are
            less work: long completions behind a short prompt.
        pairs_alone: Whether attention compares no pair with others of its row; the fewest places
            then cost least.

    Returns:
        The layout, or None if separate rows are asked for and cheaper.

    Raises:
        ValueError: If the sequences are no pairs.
    """
    if len(input_ids_BT) % 2 or not len(input_ids_BT):
        rule = "must be the chosen sequences and then as many rejected ones"
        shape = tuple(input_ids_BT.shape)
        raise argument_error("lay_out_pairs", "input_ids_BT", shape, rule)
    is_token_BT = attention_mask_BT.bool()
    T = input_ids_BT.shape[1]
    # Tokens of a sequence to the front, in their order.
    order_BT = torch.argsort(is_token_BT.logical_not().to(torch.uint8), dim=1, stable=True)
    tokens_BT = input_ids_BT.gather(1, order_BT)
    lengths_B1 = is_token_BT.sum(1, keepdim=True)
    position_BT = torch.arange(T, device=input_ids_BT.device).expand_as(tokens_BT)
    (chosen_PT, rejected_PT), (of_chosen_P1, of_rejected_P1) = (
        tokens_BT.chunk(2),
        lengths_B1.chunk(2),
    )
    in_both_PT = position_BT[: len(chosen_PT)] < torch.minimum(of_chosen_P1, of_rejected_P1)
    shared_P1 = ((chosen_PT == rejected_PT) & in_both_PT).long().cumprod(1).sum(1, keepdim=True)

    sizes_P1 = of_chosen_P1 + of_rejected_P1 - shared_P1
    sizes_P, of_rows = sizes_P1[:, 0].cpu(), None if pairs_alone else hidden_size
    row_P, offset_P, num_rows, width = _rows(sizes_P, packing, of_rows)
    if only_if_cheaper:
        # Padded on the right, attention skips what no token sees: half of the comparisons.
        separate = work(len(input_ids_BT), T, hidden_size, comparisons=T / 2)
        compared = int(sizes_P.max()) if pairs_alone else width
        if separate <= work(num_rows, width, hidden_size, comparisons=compared):
            return None

    begin_P1 = (row_P * width + offset_P).to(input_ids_BT.device)[:, None]
    behind_P1 = of_chosen_P1 - shared_P1  # a rejected token stands behind the chosen ones
    is_alone_BT = position_BT >= shared_P1.repeat(2, 1)
    zeros_P1 = torch.zeros_like(behind_P1)
    shift_B1 = torch.cat([zeros_P1, behind_P1])
    index_BT = begin_P1.repeat(2, 1) + position_BT + is_alone_BT * shift_B1

    places = num_rows * width
    target = torch.where(position_BT < lengths_B1, index_BT, places).flatten()  # padding: the last

    def in_rows(values_BT: Tensor, empty: int) -> Tensor:
        flat = values_BT.new_full((places + 1,), empty)
        flat.scatter_(0, target, values_BT.flatten())
        return flat[:-1].view(num_rows, width)

    pair_P1 = torch.arange(len(sizes_P1), device=input_ids_BT.device)[:, None]
    side_B1 = torch.cat([zeros_P1 + 1, zeros_P1 + 2])
    ordinal_BT = (is_token_BT.long().cumsum(1) - 1).clamp(min=0)
    return PairLayout(
        input_ids_RL=in_rows(tokens_BT, 0),
        position_ids_RL=in_rows(position_BT, 0),
        pair_RL=in_rows(pair_P1.repeat(2, 1).expand(-1, T).contiguous(), -1),
        part_RL=in_rows(is_alone_BT * side_B1, 0),
        index_BT=index_BT.gather(1, ordinal_BT),
    )


def work(
    rows: float | Tensor,
    width: float | Tensor,
    hidden_size: int | None,
    comparisons: float | None = None,
) -> float | Tensor:
    """What rows cost a block of a decoder, in comparisons of two tokens.

    Args:
        rows: How many.
        width: Places of each, whether filled or not.
        hidden_size: Width of the model; None for one so wide that only places cost.
        comparisons: With how many others a token is compared; None for all of its row.
    """
    if hidden_size is None:
        return rows * width
    compared = width if comparisons is None else comparisons
    return rows * width * (compared + _COMPARISONS_PER_WIDTH * hidden_size)


def _rows(
    sizes_P: Tensor, packing: bool, hidden_size: int | None
) -> tuple[Tensor, Tensor, int, int]:
    """Row and first place of each pair, how many rows there are, and how wide they are.

    Packed, the longest pair that is left goes to the row that is filled least, for every possible
    number of rows at once; the cheapest is taken. Plain numbers on the host, one step a pair.
    """
    P = len(sizes_P)
    if not packing:
        return torch.arange(P), torch.zeros_like(sizes_P), P, max(1, int(sizes_P.max()))
    sorted_P, order_P = sizes_P.sort(descending=True, stable=True)
    numbers_N = torch.arange(P)  # N = P possible numbers of rows, less 1
    filled_NR = torch.zeros(P, P, dtype=sizes_P.dtype)
    filled_NR.masked_fill_(numbers_N > numbers_N[:, None], torch.iinfo(sizes_P.dtype).max)
    row_NP, offset_NP = torch.empty(2, P, P, dtype=sizes_P.dtype)
    for pair, size in enumerate(sorted_P.tolist()):
        offset_NP[:, pair], row_NP[:, pair] = filled_NR.min(1)
        filled_NR[numbers_N, row_NP[:, pair]] += size
    filled_NR.masked_fill_(numbers_N > numbers_N[:, None], 0)
    width_N = filled_NR.max(1).values.clamp(min=1)
    costs_N = torch.as_tensor(work(numbers_N + 1, width_N, hidden_size))
    best = int(costs_N.argmin())
    back_P = order_P.argsort()
    return row_NP[best, back_P], offset_NP[best, back_P], best + 1, int(width_N[best])
