"""Batches whose rows are cut to a length: the rest of a row is left out, or becomes more rows.

A row of T + 1 tokens with labels aligned, as everywhere in Hugging Face, predicts T of them; where
labels are shifted already, a row of T tokens does. A length counts predictions: rows are cut to
length + 1 tokens, or to length. A row that is reshaped gives neighbours that share a token, as
blocks of packed text do, so that no prediction is lost but those of a remainder.

What is cut is whatever has a value for each token of each row, (B, T + 1), by any name; what cannot
be cut that way is refused, since a batch that is cut in parts only means something else.

Shapes: B rows of T + 1 tokens, L predictions in a row that was cut, K rows made of one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_align._errors import argument_error, check_choice
from lightning_align.data.packing import IGNORE_INDEX

MODES = ("truncate", "reshape")


@dataclass(frozen=True)
class RowCutter:
    """Cuts batches, in whatever they are: a mapping, a tuple of tensors, or several batches.

    Args:
        mode: ``"truncate"`` keeps the beginning of each row, ``"reshape"`` makes several rows of
            one, and leaves out what is left when a row is not a multiple of the length.
        shifted_labels: Whether labels stand where they are predicted, as in ``(x, y)`` of rows
            ``row[:-1], row[1:]``; None lets a tuple of tensors be refused, which may be either.
        end_of_text: Token that a truncated row keeps as its last one, if it ended with it.

    Raises:
        ValueError: If the mode is none, or ``end_of_text`` is given for another than truncate.
    """

    mode: str
    shifted_labels: bool | None = None
    end_of_text: int | None = None

    def __post_init__(self) -> None:
        check_choice("Curriculum", "length.mode", self.mode, MODES)
        if self.end_of_text is not None and self.mode != "truncate":
            rule = "belongs to mode='truncate': a reshaped row goes on in the next one"
            value = self.end_of_text
            raise argument_error("Curriculum", "length.end_of_text", value, rule)

    def cut(self, batch: Any, length: int) -> tuple[Any, int]:
        """The batch with rows of a length, and how many predictions it lost; never in place.

        Args:
            batch: Tensors on any device; it is returned as it is if its rows are no longer.
            length: Predictions L of a row.

        Raises:
            ValueError: If something in it has no value for each token of each row, or rows are
                padded where they begin, or completions would be cut.
        """
        if isinstance(batch, Tensor):
            cut, lost = self._cut_named({"batch": batch}, length, shifted=self.shifted_labels)
            return cut["batch"], lost
        if isinstance(batch, Mapping):
            if any(isinstance(value, Tensor) for value in batch.values()):
                cut, lost = self._cut_named(batch, length, shifted=self.shifted_labels)
                return _like_mapping(batch, cut), lost
            parts = {name: self.cut(value, length) for name, value in batch.items()}
            cut = {name: part for name, (part, _) in parts.items()}
            return _like_mapping(batch, cut), sum(lost for _, lost in parts.values())
        if isinstance(batch, (list, tuple)):
            if any(isinstance(value, Tensor) for value in batch):
                return self._cut_tuple(batch, length)
            found = [self.cut(value, length) for value in batch]
            return _like_tuple(batch, [part for part, _ in found]), sum(lost for _, lost in found)
        if batch is None:  # of several loaders, one that is exhausted
            return batch, 0
        rule = "a batch of this class cannot be cut"
        way_out = "Let the collate function return a mapping or a tuple of tensors"
        raise _error(type(batch).__name__, rule, way_out)

    def _cut_tuple(self, batch: Any, length: int) -> tuple[Any, int]:
        if self.shifted_labels is None and len(batch) > 1:
            rule = "does not say whether its targets are shifted against its inputs by one token"
            way_out = "Set length.shifted_labels to true for (row[:-1], row[1:]), or to false"
            raise _error(type(batch).__name__, rule, way_out)
        named = {f"[{number}]": value for number, value in enumerate(batch)}
        cut, lost = self._cut_named(named, length, shifted=self.shifted_labels)
        return _like_tuple(batch, list(cut.values())), lost

    def _cut_named(
        self, batch: Mapping[Any, Any], length: int, *, shifted: bool | None
    ) -> tuple[dict[Any, Any], int]:
        shared = 0 if shifted else 1  # tokens that neighbours of a reshaped row share
        width = _width(batch)
        if width - shared <= length:
            return dict(batch), 0
        _check(batch, width, whole=self.mode == "reshape")
        ignored = _targets(batch)
        if self.mode == "truncate":
            cut = {name: _columns(x, 0, length + shared) for name, x in batch.items()}
            if self.end_of_text is not None:
                _keep_end_of_text(batch, cut, self.end_of_text)
            return cut, _predictions(ignored, length + shared)
        kept = (width - shared) // length * length + shared
        cut = {name: _rows(x, length, shared) for name, x in batch.items()}
        if "position_ids" in cut:
            cut["position_ids"] = _from_each_start(cut["position_ids"])
        return cut, _predictions(ignored, kept)


def with_rows(batch: Any, rows: int) -> Any:
    """A batch of so many rows, which are those of another over and over.

    Args:
        batch: Tensors whose first dimension are rows, in mappings, lists and tuples.
        rows: How many.
    """
    if isinstance(batch, Tensor):
        return batch[torch.arange(rows, device=batch.device) % len(batch)] if batch.ndim else batch
    if isinstance(batch, Mapping):
        return _like_mapping(batch, {name: with_rows(x, rows) for name, x in batch.items()})
    if isinstance(batch, (list, tuple)):
        return _like_tuple(batch, [with_rows(value, rows) for value in batch])
    return batch


def with_width(batch: Any, width: int) -> Any:
    """A batch whose rows have so many tokens, which are those of another over and over.

    Args:
        batch: Tensors with a value for each token of each row, by name.
        width: How many.
    """
    column_T = torch.arange(width) % _width(batch)
    return _like_mapping(batch, {name: _chosen(x, column_T) for name, x in batch.items()})


def _chosen(value: Any, column_T: Tensor) -> Any:
    is_wide = isinstance(value, Tensor) and value.ndim >= 2
    return value[:, column_T.to(value.device)] if is_wide else value


def _rows(value: Any, length: int, shared: int) -> Any:
    """(B, T + 1) as (B K, L + 1): the rows that come of one follow each other."""
    if not isinstance(value, Tensor) or value.ndim < 2:
        return value
    return value.unfold(1, length + shared, length).reshape(-1, length + shared)


def _columns(value: Any, first: int, last: int) -> Any:
    is_cut = isinstance(value, Tensor) and value.ndim >= 2
    return value[:, first:last].contiguous() if is_cut else value


def _from_each_start(position_BT: Tensor) -> Tensor:
    """Positions of rows that may begin within a document, which begins anew there."""
    # Behind the first 0 another document has begun, whose positions are its own.
    within_BT = (position_BT == 0).cumsum(1) == 0
    return position_BT - within_BT * position_BT[:, :1]


def _keep_end_of_text(batch: Mapping[Any, Any], cut: dict[Any, Any], token: int) -> None:
    """Let rows that ended with an end of text end with it where they are cut."""
    inputs_BT = batch.get("input_ids")
    if inputs_BT is None:
        rule = "an end of text can be kept in input_ids only, and there are none"
        raise _error(list(batch), rule, "Leave preserve_end_of_sequence out")
    last_B = torch.full((len(inputs_BT),), inputs_BT.shape[1] - 1, device=inputs_BT.device)
    if (mask_BT := batch.get("attention_mask")) is not None:
        last_B = (mask_BT != 0).sum(1) - 1
    width = cut["input_ids"].shape[1]
    row_B = torch.arange(len(inputs_BT), device=inputs_BT.device)
    ended_B = (inputs_BT[row_B, last_B] == token) & (last_B >= width)
    for name in {"input_ids", "labels"} & set(cut):
        kept_B = batch[name][row_B, last_B]  # its label may say that it is not learned
        cut[name] = cut[name].clone()  # of one row it is a part of the batch itself
        cut[name][ended_B, -1] = kept_B[ended_B]


def _targets(batch: Mapping[Any, Any]) -> Tensor:
    """What tells which predictions count: labels, the second of a tuple, or else what is first."""
    found = _rectangles(batch)
    named = (found[name] for name in ("labels", "[1]") if name in found)
    return next(named, next(iter(found.values())))


def _predictions(target_BT: Tensor, first: int) -> int:
    """Targets behind a column."""
    return int((target_BT[:, first:] != IGNORE_INDEX).sum())


def _rectangles(batch: Mapping[Any, Any]) -> dict[Any, Tensor]:
    return {name: x for name, x in batch.items() if isinstance(x, Tensor) and x.ndim >= 2}


def _width(batch: Mapping[Any, Any]) -> int:
    """Tokens T + 1 of a row.

    Raises:
        ValueError: If nothing in the batch has rows of tokens.
    """
    found = _rectangles(batch)
    if not found:
        shapes = {name: tuple(x.shape) for name, x in batch.items() if isinstance(x, Tensor)}
        rule = "holds nothing of shape (rows, tokens)"
        raise _error(shapes, rule, "Let the collate function stack rows of tokens")
    widest: Tensor = found["input_ids"] if "input_ids" in found else next(iter(found.values()))
    return widest.shape[1]


def _check(batch: Mapping[Any, Any], width: int, *, whole: bool) -> None:
    """Refuse a batch that would mean something else once it is cut.

    Args:
        batch: By name.
        width: Tokens of a row.
        whole: Whether what is cut off a row becomes another one.

    Raises:
        ValueError: If it would.
    """
    if "completion_mask" in batch:
        raise _error("completion_mask", "would cut completions, which are learned from", _ORDER)
    for name, value in batch.items():
        if not isinstance(value, Tensor):
            if whole and isinstance(value, (list, tuple)):
                rule = f"has a value for each of its rows in {name!r}, and becomes more rows"
                raise _error({name: type(value).__name__}, rule, "Leave it out of the batch")
        elif value.ndim and (value.ndim != 2 or value.shape[1] != width):
            rule = f"{name!r} cannot be cut: it must have a value for each of the {width} tokens"
            rule += " of a row"
            way_out = "Leave it out of the batch, or make it of what was cut in the module"
            raise _error({name: tuple(value.shape)}, rule, way_out)
    mask_BT = batch.get("attention_mask")
    if mask_BT is None or bool((mask_BT != 0).all()):
        return
    if whole:
        raise _error("attention_mask", "rows are padded: some would be of nothing else", _ORDER)
    if not bool((mask_BT[:, 0] != 0).all()):
        rule = "rows are padded on their left: what is kept of them would be padding"
        raise _error("attention_mask", rule, "Pad on the right")


_ORDER = "Give order instead, which has short samples before long ones"


def _error(found: object, rule: str, way_out: str) -> ValueError:
    return argument_error("Curriculum", "length, batch", found, rule, way_out)


def _like_mapping(batch: Mapping[Any, Any], values: dict[Any, Any]) -> Any:
    """Values in a mapping of the batch's class, such as transformers' BatchEncoding."""
    if type(batch) is dict:
        return values
    made: Any = copy.copy(batch)
    if hasattr(made, "data") and isinstance(made.data, dict):  # a UserDict shares it
        made.data = dict(made.data)
    for name, value in values.items():
        made[name] = value
    return made


def _like_tuple(batch: Any, values: list[Any]) -> Any:
    make: Callable[..., Any] = getattr(type(batch), "_make", type(batch))
    return make(values)
