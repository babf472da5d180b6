"""How difficult samples are to a reference model: its loss, and its margin between two answers.

Shapes: B rows of a sample, T tokens; a pair has two rows, [chosen; rejected].
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_align._errors import argument_error
from lightning_align.layers import find_layers
from lightning_align.losses.sequence_logps import completion_logps, sequence_logps

IGNORE_INDEX = -100


class ReferenceLoss:
    """Mean loss of a sample under a reference model, in nats per token that is learned.

    Args:
        model: A decoder that ``find_layers`` can read; it is used as it is, on its device.
        key: What tells this model from another, such as a hash of its weights.
        chunk_size: Rows whose logits exist at a time, see ``linear_logprobs``.
    """

    def __init__(self, model: nn.Module, key: str, *, chunk_size: int | None = None) -> None:
        self._model = model
        self._chunk_size = chunk_size
        self.key = f"loss under {key}"

    @torch.no_grad()
    def __call__(self, sample: Mapping[str, Tensor]) -> float:
        """The loss of a sample.

        Args:
            sample: ``input_ids`` and ``labels``, (B, T), and ``attention_mask`` or
                ``position_ids`` where there are any; a batch of one.

        Raises:
            ValueError: If nothing is learned of it.
        """
        rows = _rows("ReferenceLoss", sample, ("input_ids", "labels"), self._model)
        learned_BT = rows["labels"] != IGNORE_INDEX
        extra = {name: rows[name] for name in ("attention_mask", "position_ids") if name in rows}
        layers = find_layers(self._model)
        hidden_BTD = layers.hidden_states(rows["input_ids"], **extra)
        scored = completion_logps(
            hidden_BTD, layers.head, rows["input_ids"], learned_BT, chunk_size=self._chunk_size
        )
        count = int(scored.lengths_B.sum())
        if count == 0:
            raise argument_error("ReferenceLoss", "labels", "-100", "no token is learned")
        return -float(scored.logps_B.sum()) / count


class ReferenceMargin:
    """How much likelier a reference model finds the rejected completion than the chosen one.

    The log-probability of the rejected completion less that of the chosen one, in nats: a pair that
    the reference gets right by a wide margin is easy, and comes first (Curri-DPO,
    arXiv:2403.07230, which orders pairs by the gap of their ratings).

    Args:
        model: A decoder that ``find_layers`` can read; it is used as it is, on its device.
        key: What tells this model from another, such as a hash of its weights.
        chunk_size: Rows whose logits exist at a time, see ``linear_logprobs``.
    """

    def __init__(self, model: nn.Module, key: str, *, chunk_size: int | None = None) -> None:
        self._model = model
        self._chunk_size = chunk_size
        self.key = f"margin under {key}"

    @torch.no_grad()
    def __call__(self, sample: Mapping[str, Tensor]) -> float:
        """The margin of a pair.

        Args:
            sample: ``input_ids``, ``attention_mask`` and ``completion_mask``, (2, T).

        Raises:
            ValueError: If it is no pair.
        """
        names = ("input_ids", "attention_mask", "completion_mask")
        rows = _rows("ReferenceMargin", sample, names, self._model)
        if len(rows["input_ids"]) != 2:
            rule = "must have two rows, the chosen and the rejected one"
            raise argument_error("ReferenceMargin", "rows", len(rows["input_ids"]), rule)
        chosen, rejected = sequence_logps(
            self._model, *(rows[name] for name in names), chunk_size=self._chunk_size
        ).tolist()
        return float(rejected - chosen)


def _rows(
    where: str, sample: Mapping[str, Tensor], names: tuple[str, ...], model: nn.Module
) -> dict[str, Tensor]:
    """The tensors of a sample as rows, on the device of the model."""
    if not isinstance(sample, Mapping) or any(name not in sample for name in names):
        found = ", ".join(sample) if isinstance(sample, Mapping) else type(sample).__name__
        rule = f"must be a mapping with {', '.join(names)}"
        raise argument_error(where, "sample", found, rule)
    device = next(model.parameters()).device
    tensors = {name: torch.as_tensor(value) for name, value in sample.items()}
    return {name: value.reshape(-1, value.shape[-1]).to(device) for name, value in tensors.items()}
