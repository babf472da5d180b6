"""The evidence of an incident: what the run looked like up to it, collected while it looked well.

Every step leaves a row of figures on the device and its losses; nothing waits for them. Only an
alarm reads them, asks the present weights about the latest healthy batch, and lets the ranks
exchange what each of them saw, once.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_align._errors import check_least
from lightning_align.callbacks.spikes.layers import LayerFigures
from lightning_align.data.sampler import PositionSampler
from lightning_align.data.skipped import SkippedBatches
from lightning_align.layers.sharding import give_back_gathered
from lightning_align.layers.surgery import evaluating
from lightning_align.run.protocols import (
    ComputesBatchLoss,
    GathersParameters,
    HasPosition,
    SumsOverWindow,
    datamodule_of,
    has_replicas,
    keeps_shapes,
    leaves_sharding,
    tokenizer_of,
)
from lightning_align.run.replicas import added_up, of_every_rank, replica
from lightning_align.run.skip_list import stream_of
from lightning_align.spike_causes import (
    Cause,
    Evidence,
    Histories,
    first_to_leave,
    left_since,
    name_cause,
    scores,
    typical,
)
from lightning_align.spike_incidents import BatchRecord, Incident, LayerRecord
from lightning_align.stability import SpikeVerdict

WINDOW = 128  # steps that are remembered
FOLLOWS = 8  # steps after an incident whose step was taken that may still be its
PREVIEW_BATCHES, PREVIEW_ROWS = 4, 2  # of a rank, of a batch


@dataclass
class _Batch:
    """A batch of the open window, as far as it is needed again."""

    position: int
    batch: Any
    finite: Tensor | None
    loss: Tensor | None = None


class SpikeEvidence:
    """Collects, for a guard that calls it, what explains an incident.

    Training is the same to the last bit. A step costs a pass over its gradients, and one in eight
    another over the weights; an incident costs a forward of the window's batches, where the module
    can tell a batch's loss.

    Args:
        preview_tokens: Tokens of a row that a report shows as text; 0 for none.

    Raises:
        ValueError: If ``preview_tokens`` is negative.
    """

    def __init__(self, preview_tokens: int = 64) -> None:
        check_least("SpikeGuard", 0, preview_tokens=preview_tokens)
        self.preview_tokens = preview_tokens
        self._begin()

    def _begin(self) -> None:
        self._layers: LayerFigures | None = None
        self._missing: list[str] = []
        self._window: list[_Batch] = []
        self._healthy: _Batch | None = None
        self._steps: deque[tuple[int, float, float, float]] = deque(maxlen=WINDOW)
        self._flagged: set[int] = set()  # steps with an alarm
        self._sums_before: Tensor | None = None
        self._stepping = False
        self._is_resumed = False
        self._together = False  # whether ranks can run the model only at the same time
        self._open: Incident | None = None
        self._previous: tuple[int, Cause] | None = None

    def set_up(
        self, trainer: pl.Trainer, module: pl.LightningModule, by_layer: bool = True
    ) -> None:
        """Find the layers, where the strategy leaves weights and gradients in them.

        Args:
            trainer: The run, with its strategy set up.
            module: Its module.
            by_layer: Whether layers are looked at in each step.
        """
        self._begin()
        self._is_resumed = trainer.ckpt_path is not None or trainer.global_step > 0
        strategy = trainer.strategy
        self._together = leaves_sharding(strategy)
        if self._together:  # a logger of one rank lets all of them look
            by_layer = any(of_every_rank(trainer, by_layer))
        if not by_layer:
            self._missing.append(
                "figures by layer: nobody reads them, without report_dir or logger"
            )
        elif isinstance(strategy, GathersParameters) or not keeps_shapes(strategy):
            name = type(strategy).__name__
            self._missing.append(f"figures by layer: {name} keeps weights and gradients elsewhere")
        else:
            over_ranks: dict[str, Any] = {}
            if self._together:
                over_ranks = {"total": added_up, "ranks": trainer.world_size}
            self._layers = LayerFigures(module, WINDOW, **over_ranks)
        # Asked here and not in every batch: it takes microseconds.
        self._has_sums = isinstance(module, SumsOverWindow) and isinstance(module.accumulated, dict)
        can_ask = has_replicas(strategy) or self._together
        self._asks = isinstance(module, ComputesBatchLoss) and can_ask
        if not self._asks:
            why = "the module has no batch_loss"
            if isinstance(module, ComputesBatchLoss):
                why = f"not computed under {type(strategy).__name__}"
            self._missing.append(f"losses of batches after the step: {why}")

    # In every batch and step

    def begin_batch(self, batch: Any, position: int) -> None:
        """Note a batch, the number ``position`` of the stream, before its training step."""
        kept = batch if self._asks else _tokens(batch)
        self._window.append(_Batch(position, kept, _finite(batch)))

    @property
    def window(self) -> dict[str, int]:
        """Where the open window is, as an incident has it."""
        return {"position": self._window[0].position, "num_batches": len(self._window)}

    def add_loss(self, module: Any, loss: Tensor) -> None:
        """Note the mean loss of the batch that was begun last, once it is known."""
        sums = module.accumulated.get("loss") if self._has_sums else None
        if sums is not None:  # [sum, weight] of the window so far
            before, self._sums_before = self._sums_before, sums
            since = sums - before if before is not None else sums
            loss = since[0] / since[1].clamp(min=1)
        if self._window:
            self._window[-1].loss = loss.detach()

    def before_step(self, optimizer: Optimizer, verdict: SpikeVerdict) -> None:
        """Note the figures of a step before it is taken, with gradients as it would take them."""
        lr = max(float(group["lr"]) for group in optimizer.param_groups)
        norm = verdict.grad_norm if verdict.grad_norm is not None else math.nan
        self._steps.append((verdict.step, verdict.loss, norm, lr))
        self._stepping = True
        if self._layers is not None:
            self._layers.before_step([optimizer], is_alarm=verdict.is_spike)

    def after_step(
        self, trainer: pl.Trainer, module: pl.LightningModule, taken: bool
    ) -> Incident | None:
        """Note what a step has done.

        Collective after an alarm.

        Args:
            trainer: The run.
            module: Its module.
            taken: Whether the step moved the weights.

        Returns:
            The incident of this step, if its batches' losses after the step were added.
        """
        stepping, self._stepping = self._stepping, False
        incident, self._open = self._open, None
        batches, self._window, self._sums_before = self._window, [], None
        if not stepping:  # a window without a loss, or an overflow that a scaler has dealt with
            return None
        if self._layers is not None and taken:
            self._layers.after_step()
        if incident is None:
            self._healthy = batches[-1] if batches else None
            return None
        if not taken:
            return None
        if incident.cause is not None:
            self._previous = (incident.step, incident.cause)
        return self._ask_again(trainer, module, incident, batches)

    def rewound(
        self, trainer: pl.Trainer, module: pl.LightningModule, incident: Incident
    ) -> Incident | None:
        """Go on from older weights; returns the incident with its batches' losses by them.

        To be called in the place of ``after_step``. Collective.
        """
        batches, self._window, self._sums_before = self._window, [], None
        self._open = self._healthy = self._previous = None
        if self._layers is not None:
            self._layers.forget_weights()
        return self._ask_again(trainer, module, incident, batches)

    # At an alarm

    def explain(self, trainer: pl.Trainer, module: pl.LightningModule, incident: Incident) -> None:
        """Add to an incident its batches, layers, learning rates and cause.

        To be called after ``before_step`` and before gradients are changed. Collective.
        """
        self._flagged.add(incident.step)
        self._open = incident
        ranks = of_every_rank(trainer, self._own(trainer, module))
        incident.batches = _of_all_replicas(ranks)
        incident.missing = list(dict.fromkeys(text for own in ranks for text in own["missing"]))
        evidence = self._evidence(ranks, incident)
        incident.lrs = evidence.lrs
        incident.cause = name_cause(evidence)
        incident.layers = _layer_records(evidence)
        incident.first_layers = first_to_leave(evidence.grad_norms)
        if incident.action in ("skip", "rewind", "stop"):  # what is rewound over comes later
            positions = {(each.position, each.position + 1) for each in incident.batches}
            incident.skipped = SkippedBatches(positions).plain()
        incident.stream = stream_of(trainer)
        steps, losses, norms, _ = zip(*self._steps, strict=True)
        incident.history = {"step": list(steps), "loss": list(losses), "grad_norm": list(norms)}

    def _own(self, trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, Any]:
        """What this rank has seen, as plain data."""
        missing = list(self._missing)
        if self._is_resumed and len(self._steps) < WINDOW:
            first = self._steps[0][0]
            missing.append(f"steps before {first}: where a run is resumed, evidence begins anew")
        histories: dict[str, Histories] = {}
        is_same = self._together or has_replicas(trainer.strategy)  # on every rank
        if self._layers is not None and (trainer.is_global_zero or not is_same):
            histories = self._layers.histories()
        batches = [self._record(trainer, each) for each in self._window]
        try:
            self._add_previews(trainer, batches)
        except Exception as error:  # of a tokenizer of anybody's; an explanation is not worth a run
            missing.append(f"text of batches: {type(error).__name__}: {error}")
        own: dict[str, Any] = {"histories": histories, "missing": missing, "broken_layer": None}
        own["broken_data"] = any(b.finite is not None and not b.finite for b in self._window)
        own["reference"] = None
        if self._asks and self._healthy is not None and self._healthy.loss is not None:
            now = self._loss(trainer, module, self._healthy.batch, missing)
            own["reference"] = None if now is None else (float(self._healthy.loss), now)
        broken = [b for b in self._window if b.loss is not None and not b.loss.isfinite()]
        if self._asks and (any(of_every_rank(trainer, bool(broken))) if self._together else broken):
            with _first_broken(module, self._layers) as found:
                self._loss(trainer, module, (broken or self._window)[0].batch, missing)
            own["broken_layer"] = next(iter(found), None) if broken else None
        own |= {"batches": [asdict(each) for each in batches], "replica": replica(trainer)[1]}
        return own

    def _evidence(self, ranks: list[dict[str, Any]], incident: Incident) -> Evidence:
        names = self._layers.layers if self._layers is not None else []
        merged: dict[str, Histories] = {}
        for own in ranks:
            for figure, histories in own["histories"].items():
                merged.setdefault(figure, {}).update(histories)
        by_layer = {
            figure: {name: histories[name] for name in names if name in histories}
            for figure, histories in merged.items()
        }
        steps = list(self._steps)
        healthy = [loss for step, loss, _, _ in steps[:-1] if step not in self._flagged]
        references = [own["reference"] for own in ranks if own["reference"] is not None]
        means = [sum(values) / len(references) for values in zip(*references, strict=True)]
        recent = self._previous is not None and incident.step - self._previous[0] <= FOLLOWS
        return Evidence(
            losses=[*healthy, steps[-1][1]],
            lrs=[lr for *_, lr in steps],
            batch_losses=[b.loss for b in incident.batches if b.loss is not None],
            reference=(means[0], means[1]) if means else None,
            broken_layer=next((o["broken_layer"] for o in ranks if o["broken_layer"]), None),
            broken_data=any(own["broken_data"] for own in ranks),
            previous=self._previous[1] if recent and self._previous is not None else None,
            **by_layer,
        )

    def _record(self, trainer: pl.Trainer, batch: _Batch) -> BatchRecord:
        loss = float(batch.loss) if batch.loss is not None else None
        samples = _samples(trainer, batch.position)
        return BatchRecord(batch.position, trainer.global_rank, loss, samples=samples)

    def _add_previews(self, trainer: pl.Trainer, records: list[BatchRecord]) -> None:
        """Show the beginning of the batches with the largest losses as text."""
        tokenizer = tokenizer_of(trainer)
        if not self.preview_tokens or tokenizer is None:
            return
        worst = sorted(zip(records, self._window, strict=True), key=lambda pair: _badness(pair[0]))
        for record, kept in worst[:PREVIEW_BATCHES]:
            ids = _tokens(kept.batch)
            if ids is not None:
                rows = ids[:PREVIEW_ROWS, : self.preview_tokens].tolist()
                record.preview = [str(tokenizer.decode(row)) for row in rows]

    def _ask_again(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        incident: Incident,
        batches: list[_Batch],
    ) -> Incident | None:
        """Add the losses of an incident's batches by the present weights."""
        if not self._asks:
            return None
        missing: list[str] = []
        after = {b.position: self._loss(trainer, module, b.batch, missing) for b in batches}
        for rank, losses in enumerate(of_every_rank(trainer, after)):
            for record in incident.batches:
                if record.rank == rank:
                    record.loss_after = losses.get(record.position)
        incident.missing += missing
        return incident

    def _loss(
        self, trainer: pl.Trainer, module: Any, batch: Any, missing: list[str]
    ) -> float | None:
        """The loss of a batch by the present weights, computed without a trace."""
        on_cuda = module.device.type == "cuda"
        try:
            with ExitStack() as stack:
                stack.enter_context(isolate_rng(include_cuda=on_cuda))
                stack.enter_context(evaluating(module))
                stack.enter_context(torch.no_grad())
                stack.enter_context(trainer.precision_plugin.forward_context())
                return float(module.batch_loss(batch))
        except Exception as error:  # no memory left, or a method of anybody's; not worth a run
            # No memory, under one of its names: of this rank alone, for whom the others would wait.
            if self._together and isinstance(error, RuntimeError):
                raise
            missing.append(f"loss of a batch: {type(error).__name__}: {error}")
            return None
        finally:
            give_back_gathered(module)  # a module of one's own may have gathered itself


def _of_all_replicas(ranks: list[dict[str, Any]]) -> list[BatchRecord]:
    """The batches of each replica once, from a rank that knows the most losses of them."""
    best: dict[int, list[dict[str, Any]]] = {}
    for own in ranks:
        before = best.setdefault(own["replica"], own["batches"])
        if _known(own["batches"]) > _known(before):
            best[own["replica"]] = own["batches"]
    return [BatchRecord(**each) for batches in best.values() for each in batches]


def _known(batches: list[dict[str, Any]]) -> int:
    return sum(each["loss"] is not None for each in batches)


def _layer_records(evidence: Evidence) -> list[LayerRecord]:
    found: dict[str, LayerRecord] = {}
    for values in (evidence.weight_norms, evidence.grad_norms):
        found |= {layer: LayerRecord(layer) for layer in values}
    for layer, history in evidence.grad_norms.items():
        record = found[layer]
        record.score, record.since = scores(history)[-1], left_since(history)
        record.grad_norm, record.usual_grad_norm = history[-1], typical(history)
    for layer, history in evidence.gradient_ratios.items():
        record = found[layer]
        record.gradient_ratio, record.usual_gradient_ratio = history[-1], typical(history)
    for layer, history in evidence.updates.items():
        if len(history) > 1:  # the last one is yet to come
            found[layer].update, found[layer].usual_update = history[-2], typical(history)
    return list(found.values())


@contextmanager
def _first_broken(module: nn.Module, layers: LayerFigures | None) -> Iterator[list[str]]:
    """Collect the names of layers whose output is not finite, in the order of their calls."""
    found: list[str] = []

    def look(name: str, _module: nn.Module, _inputs: Any, output: Any) -> None:
        if not all(bool(each.isfinite().all()) for each in _tensors(output)):
            found.append(name)

    with ExitStack() as stack:
        for name in layers.layers if layers is not None else []:
            part = dict(module.named_modules()).get(name)
            if part is not None:
                stack.callback(part.register_forward_hook(partial(look, name)).remove)
        yield found


def _tensors(value: Any) -> Iterator[Tensor]:
    """Tensors in nested containers that can be asked whether they are finite."""
    if isinstance(value, Tensor):
        is_plain = value.layout is torch.strided and not value.is_nested
        if is_plain and value.is_floating_point() and value.dtype.itemsize > 1:
            yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(each)


def _finite(batch: Any) -> Tensor | None:
    """Whether a batch's numbers are finite, on its device; None of a batch without any."""
    finite = [each.isfinite().all() for each in _tensors(batch)]
    return torch.stack(finite).all() if len(finite) > 1 else next(iter(finite), None)


def _tokens(batch: Any) -> Tensor | None:
    """Token ids (B, T) of a batch, if it has them."""
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else batch
    is_ids = isinstance(ids, Tensor) and ids.dim() == 2 and not ids.is_floating_point()
    return ids if is_ids else None


def _samples(trainer: pl.Trainer, position: int) -> list[int]:
    """Indices of the samples of a batch on this rank, where a sampler can look them up."""
    data: Any = datamodule_of(trainer)
    known = isinstance(data, HasPosition)
    sampler: Any = (
        data.train_sampler if known else getattr(trainer.train_dataloader, "sampler", None)
    )
    if not isinstance(sampler, PositionSampler):
        return []
    return [index for index in sampler.batch(position) if index >= 0]  # negative ones are padding


def _badness(record: BatchRecord) -> float:
    """Smallest for the batch to look at first."""
    known = record.loss is not None and math.isfinite(record.loss)
    return -record.loss if known else -math.inf  # type: ignore[operator]
