"""Why the first loss is not the one of theory, found by taking each cause away.

Policy and reference are computed again without dropout, in fp32, and by plain attention in separate
rows. Nothing is left changed: generators, modes, values, kernels and buffers are put back.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from lightning_align._compat.transformers_attention import attention_of, eager_attention
from lightning_align.layers.find import find_language_models, kept_layers
from lightning_align.layers.surgery import evaluating
from lightning_align.losses import CompletionLogps, FirstLoss, first_losses
from lightning_align.losses.sequence_logps import model_completion_logps
from lightning_align.run.protocols import (
    AsksReference,
    ScoresPairs,
    frozen_modules,
    has_replicas,
)
from lightning_align.run.rng import undrawn

# Of the theoretical value, or of 1 where that is less. A margin of 0.002 nats moves DPO's loss at
# beta 0.1 by so much; rounding in fp32 by a hundredth of it.
TOLERANCE = 1e-4
# A cause is one without which the loss is right, and nearer by so much: dropout that is drawn anew
# may come near by chance.
NEARER = 0.1
ROWS = ("input_ids", "attention_mask", "completion_mask")

Scored = tuple[CompletionLogps, CompletionLogps | None]


def check_first_loss(
    trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any
) -> list[FirstLoss]:
    """Compare the losses of the first batch with theory, and say why if they are off.

    Args:
        trainer: Who fits.
        pl_module: A module that ``ScoresPairs``, before its first step.
        batch: Its first batch.

    Returns:
        What was measured, empty if no loss has a theoretical value.
    """
    assert isinstance(pl_module, ScoresPairs)
    if not pl_module.options.needs_reference:
        return []
    models = [pl_module, *frozen_modules(pl_module).values()]
    attempts = _Attempts(trainer, pl_module, batch, models)
    with torch.no_grad(), undrawn(pl_module.device), _same_buffers(models):
        found = attempts.losses()
        wrong = next((each for each in found if not _is_right(each)), None)
        reason = None
        if wrong is not None and has_replicas(trainer.strategy):
            reason = attempts.reason(wrong)
        elif wrong is not None:  # values that come and go cannot be replaced for a while
            reason = f"Why is not tried under {type(trainer.strategy).__name__}."
    if wrong is not None:
        rank_zero_warn(
            f"PreferenceDiagnostics: the first loss ({wrong.name}) is {wrong.loss:.6g}, and while"
            f" policy and reference agree it is {wrong.theory:.6g} for every pair; pairs are off"
            f" by {wrong.deviation:.2g} in the mean. {reason}"
        )
    elif found:
        values = ", ".join(f"{each.loss:.6g} ({each.name})" for each in found)
        rank_zero_info(f"PreferenceDiagnostics: the first loss is as in theory, {values}")
    return found


class _Attempts:
    """The first batch, scored again and again with causes of a wrong loss taken away."""

    def __init__(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Any,
        models: Sequence[nn.Module],
    ) -> None:
        self.trainer = trainer
        self.pl_module = pl_module
        self.batch = batch
        self.models = models

    def losses(self, *without: str) -> list[FirstLoss]:
        """Losses without some of dropout, dtype and kernel."""
        contexts: dict[str, Callable[[], AbstractContextManager[Any]]] = {
            "dropout": lambda: evaluating(self.pl_module),
            "dtype": lambda: in_float32(self.models),
            "kernel": lambda: eager_attention(self._language_models()),
        }
        autocast = self.trainer.precision_plugin.forward_context
        with ExitStack() as stack:
            for cause in without:
                stack.enter_context(contexts[cause]())
            stack.enter_context(nullcontext() if "dtype" in without else autocast())
            policy, reference = self._separately() if "kernel" in without else self._as_it_is()
        if reference is None:
            return []
        assert isinstance(self.pl_module, ScoresPairs)
        return first_losses(policy, reference, self.pl_module.options)

    def reason(self, wrong: FirstLoss) -> str:
        """The causes without which the loss is right, in words."""
        causes = [cause for cause in ("dropout", "dtype", "kernel") if self._helps(wrong, cause)]
        if causes:
            return " ".join(self._told(cause) for cause in causes)
        if self._helps(wrong, "dropout", "dtype", "kernel"):
            return "It is right only without dropout, in fp32 and by eager attention together."
        return (
            "It is so without dropout, in fp32 and by eager attention, too: policy and reference"
            " have other weights. That is as it should be if they are different models."
        )

    def _helps(self, wrong: FirstLoss, *without: str) -> bool:
        try:
            found = {each.name: each for each in self.losses(*without)}
        except (RuntimeError, ValueError):  # no memory for fp32, a kernel that cannot be left
            return False
        is_nearer = not found[wrong.name].deviation > NEARER * wrong.deviation  # it may be NaN
        return is_nearer and all(map(_is_right, found.values()))

    def _told(self, cause: str) -> str:
        if cause == "dropout":
            named = self.pl_module.named_modules()
            drops = [name for name, part in named if "dropout" in type(part).__name__.lower()]
            active = [name for name in drops if getattr(self._part(name), "p", 1)]
            where = f" Modules with one: {', '.join(active[:3])}." if active else ""
            return f"In eval mode it is right: something drops out.{where}"
        if cause == "dtype":
            dtypes = [sorted({str(p.dtype) for p in m.parameters()}) for m in self.models]
            return (
                f"In fp32 it is right: it is the dtype. precision={self.trainer.precision!r},"
                f" parameters of the policy {dtypes[0]}, of the reference {dtypes[1:]}."
            )
        kernels = [attention_of(model) for model in self._language_models()]
        layout = getattr(self.pl_module, "layout", None)
        of_rows = f", and rows of pairs {layout}" if layout not in (None, "separate") else ""
        return (
            "By eager attention in separate rows it is right: it is the kernel. Those of policy"
            f" and reference are {kernels}{of_rows}."
        )

    def _part(self, name: str) -> nn.Module:
        return self.pl_module.get_submodule(name)

    def _language_models(self) -> list[nn.Module]:
        return [found for model in self.models for found in find_language_models(model).values()]

    def _as_it_is(self) -> Scored:
        assert isinstance(self.pl_module, ScoresPairs)
        return self.pl_module.score_pairs(self.batch)

    def _separately(self) -> Scored:
        layers, module = kept_layers(self.pl_module), self.pl_module
        if layers is None or not isinstance(module, AsksReference):
            return self._as_it_is()
        rows = [self.batch[name] for name in ROWS]
        policy = model_completion_logps(layers.model, *rows)
        if module.reference_refusal is not None:
            return policy, self._as_it_is()[1]  # of values that were kept
        with module.as_reference() as reference:
            return policy, model_completion_logps(reference, *rows)


def _is_right(found: FirstLoss) -> bool:
    return found.deviation <= TOLERANCE * max(1.0, abs(found.theory))  # false for NaN


@contextmanager
def in_float32(modules: Sequence[nn.Module]) -> Iterator[None]:
    """All values in fp32 for a while, rounded to the coarsest dtype among them.

    Rounded, so that a model and a copy of it in another dtype have the same weights.
    """
    values = {id(p): p for module in modules for p in (*module.parameters(), *module.buffers())}
    floating = [value for value in values.values() if value.is_floating_point()]
    held = [value.data for value in floating]
    coarsest = max((value.dtype for value in held), key=lambda dtype: torch.finfo(dtype).eps)
    try:
        for value, data in zip(floating, held, strict=True):
            rounded = data.to(coarsest) if isinstance(value, nn.Parameter) else data
            value.data = rounded.float()
        yield
    finally:
        for value, data in zip(floating, held, strict=True):
            value.data = data


@contextmanager
def _same_buffers(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Behind it buffers, such as running statistics, have the values that they had."""
    buffers = [buffer for module in modules for buffer in module.buffers()]
    held = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        for buffer, value in zip(buffers, held, strict=True):
            buffer.copy_(value)
