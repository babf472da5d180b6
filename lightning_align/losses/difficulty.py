"""How difficult samples are to a reference model: its loss, and its margin between two answers.

Shapes: B rows of several samples, T tokens of the longest; a pair has two rows, [chosen; rejected].
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from typing_extensions import override

from lightning_align._declared import declared
from lightning_align._errors import argument_error, check_least
from lightning_align.layers import find_layers
from lightning_align.losses.linear_logprobs import linear_logprobs
from lightning_align.losses.sequence_logps import padding_arguments, sequence_logps

IGNORE_INDEX = -100
OPTIONAL = ("attention_mask", "position_ids")

Rows = dict[str, Tensor]


class _ReferenceMetric(ABC):
    """Scores samples under a frozen model, those of about one length together."""

    needed: ClassVar[tuple[str, ...]]

    def __init__(
        self, model: nn.Module, key: str, *, batch_size: int = 16, chunk_size: int | None = None
    ) -> None:
        where = type(self).__name__
        check_least(where, 1, batch_size=batch_size)
        if model.training:
            rule = "must be in evaluation mode, or dropout would draw the difficulties"
            raise argument_error(where, "model", type(model).__name__, rule, "Call model.eval()")
        self._layers = find_layers(model)
        self._batch_size = batch_size
        self._chunk_size = chunk_size
        self._probed = False
        self.key = f"{where} under {key}"

    def __call__(self, sample: Mapping[str, Tensor]) -> float:
        """The difficulty of a sample; see :meth:`many`."""
        return self.many([sample])[0]

    @torch.no_grad()
    def many(self, samples: Sequence[Mapping[str, Tensor]]) -> list[float]:
        """The difficulty of each sample.

        Args:
            samples: Mappings with what ``needed`` names, (T,) or (rows, T) each.

        Raises:
            ValueError: If one has something else, or nothing to score.
        """
        rows = [self._rows(sample) for sample in samples]
        if len({frozenset(each) for each in rows}) > 1:
            rule = "must all have the same names"
            raise argument_error(type(self).__name__, "samples", "...", rule)
        by_length = sorted(range(len(rows)), key=lambda i: rows[i]["input_ids"].shape[1])
        values = [0.0] * len(rows)
        for first in range(0, len(rows), self._batch_size):
            chosen = by_length[first : first + self._batch_size]
            counts = [len(rows[i]["input_ids"]) for i in chosen]
            scores = self._score(_stacked([rows[i] for i in chosen]), counts)
            for i, score in zip(chosen, scores, strict=True):
                values[i] = score
        return values

    @abstractmethod
    def _score(self, rows: Rows, counts: list[int]) -> list[float]:
        """Difficulties of samples that have ``counts`` rows each."""

    def _rows(self, sample: Mapping[str, Tensor]) -> Rows:
        """The tensors of a sample as rows, on the device of the model."""
        where = type(self).__name__
        if not isinstance(sample, Mapping) or any(name not in sample for name in self.needed):
            found = ", ".join(sample) if isinstance(sample, Mapping) else type(sample).__name__
            rule = f"must be a mapping with {', '.join(self.needed)}"
            raise argument_error(where, "sample", found, rule)
        device = next(self._layers.model.parameters()).device
        names = {*self.needed, *(name for name in OPTIONAL if name in sample)}
        tensors = {name: torch.as_tensor(sample[name]) for name in names}
        return {name: x.reshape(-1, x.shape[-1]).to(device) for name, x in tensors.items()}


@declared
class ReferenceLoss(_ReferenceMetric):
    """Mean loss of a sample under a reference model, in nats per token that is learned.

    A sample is a batch of one: ``input_ids`` and ``labels``, (B, T), and ``attention_mask`` or
    ``position_ids`` where there are any.

    Args:
        model: A decoder that ``find_layers`` can read, in evaluation mode, on its device.
        key: What tells this model from another, such as a hash of its weights.
        batch_size: Samples that the model sees at once.
        chunk_size: Rows whose logits exist at a time, see ``linear_logprobs``.

    Raises:
        ValueError: If the model is in training mode, or ``batch_size`` is below 1.
    """

    needed = ("input_ids", "labels")

    @override
    def _score(self, rows: Rows, counts: list[int]) -> list[float]:
        read = {name: tensor[:, :-1] for name, tensor in rows.items()}  # the last predicts nothing
        extra = padding_arguments(read["attention_mask"]) if "attention_mask" in rows else {}
        if "position_ids" in rows:
            if not self._probed:
                self._layers.probe_documents()
                self._probed = True
            extra["position_ids"] = read["position_ids"]
        hidden_BTD = self._layers.hidden_states(read["input_ids"], **extra)
        targets_BT = rows["labels"][:, 1:]
        learned_BT = targets_BT != IGNORE_INDEX
        logps_N = linear_logprobs(
            hidden_BTD[learned_BT],
            self._layers.head,
            targets_BT[learned_BT],
            chunk_size=self._chunk_size,
        ).logps_N
        logps_BT = logps_N.new_zeros(learned_BT.shape).masked_scatter(learned_BT, logps_N)
        sums = [part.sum().item() for part in torch.split(logps_BT.sum(1), counts)]
        lengths = [int(part.sum()) for part in torch.split(learned_BT.sum(1), counts)]
        if 0 in lengths:
            raise argument_error("ReferenceLoss", "labels", IGNORE_INDEX, "no token is learned")
        return [-logp / length for logp, length in zip(sums, lengths, strict=True)]


@declared
class ReferenceMargin(_ReferenceMetric):
    """How much likelier a reference model finds the rejected completion than the chosen one.

    The log-probability of the rejected completion less that of the chosen one, in nats: a pair that
    the reference gets right by a wide margin is easy, and comes first (Curri-DPO,
    arXiv:2403.07230, which orders pairs by the gap of their ratings). A sample is a pair:
    ``input_ids``, ``attention_mask`` and ``completion_mask``, (2, T).

    Args:
        model: A decoder that ``find_layers`` can read, in evaluation mode, on its device.
        key: What tells this model from another, such as a hash of its weights.
        batch_size: Pairs that the model sees at once.
        chunk_size: Rows whose logits exist at a time, see ``linear_logprobs``.

    Raises:
        ValueError: If the model is in training mode, or ``batch_size`` is below 1.
    """

    needed = ("input_ids", "attention_mask", "completion_mask")

    @override
    def _score(self, rows: Rows, counts: list[int]) -> list[float]:
        if set(counts) != {2}:
            rule = "must have two rows, the chosen and the rejected one"
            other = next(count for count in counts if count != 2)
            raise argument_error("ReferenceMargin", "rows", other, rule)
        masked = (rows[name] for name in self.needed)
        logps_B = sequence_logps(self._layers.model, *masked, chunk_size=self._chunk_size)
        margins: list[float] = (logps_B[1::2] - logps_B[::2]).tolist()
        return margins


def _stacked(samples: list[Rows]) -> Rows:
    """The rows of samples, one below the other, filled up on the right."""
    length = max(rows["input_ids"].shape[1] for rows in samples)
    fills = {name: IGNORE_INDEX if name == "labels" else 0 for name in samples[0]}
    return {
        name: torch.cat(
            [pad(x := rows[name], (0, length - x.shape[1]), value=fill) for rows in samples]
        )
        for name, fill in fills.items()
    }
