"""Which part of a batch each micro-batch is, as the user's loss counts it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn

from lightning_align.layers import is_hugging_face
from lightning_align.layers.surgery import replaced
from lightning_align.run.protocols import WeighsMicrobatches, loss_is_sum
from lightning_align.strategies.pipeline.chain import Step, quiet

_IGNORED = -100  # the label that transformers' losses leave out


def shares_of(module: pl.LightningModule, steps: Sequence[Step]) -> list[float]:
    """Shares of the micro-batches, which sum to one.

    By what the module weighs with ``pipeline_microbatch_weight``; where a model of transformers is
    given ``labels=``, by those of them that its mean is over; else by rows.

    Args:
        module: The user's module.
        steps: Its step for each micro-batch.
    """
    if isinstance(module, WeighsMicrobatches):
        weights = [float(module.pipeline_microbatch_weight(step.batch)) for step in steps]
    else:
        weights = _numbers_of_labels(module, steps)
    total = sum(weights)
    if not total:
        return [1 / len(steps)] * len(steps)
    return [weight / total for weight in weights]


def _numbers_of_labels(module: pl.LightningModule, steps: Sequence[Step]) -> list[float]:
    models = [part for part in module.modules() if is_hugging_face(part)]
    if not models or loss_is_sum(module):
        return []
    numbers = [_number_of_labels(module, models, step) for step in steps]
    return [number for number in numbers if number is not None] if None not in numbers else []


class _Called(BaseException):  # no error: the step gets no further than its model
    pass


def _is_shifted(model: Any) -> bool:
    """Whether its loss compares a position with the label of the next one."""
    is_causal = getattr(model.loss_function, "__name__", "") == "ForCausalLMLoss"
    return is_causal and not getattr(model.config, "is_encoder_decoder", False)


def _number_of_labels(
    module: pl.LightningModule, models: list[nn.Module], step: Step
) -> float | None:
    """How many labels count; None if the step passes none to a model."""
    found: list[float] = []

    def note(model: nn.Module, labels: Any) -> None:
        if isinstance(labels, Tensor) and not labels.is_floating_point():
            counted = labels[..., 1:] if labels.ndim > 1 and _is_shifted(model) else labels
            found.append(float((counted != _IGNORED).sum()))

    def stopping(model: nn.Module) -> Any:
        def forward(*_: Any, **kwargs: Any) -> None:
            note(model, kwargs.get("labels"))
            raise _Called

        return forward

    with ExitStack() as stack:
        stack.enter_context(quiet(module))
        for model in models:
            stack.enter_context(replaced(model, "forward", stopping(model)))
        try:
            step()
        except _Called:
            pass
        except Exception:
            return None  # the run of the step tells
    return found[0] if found else None
