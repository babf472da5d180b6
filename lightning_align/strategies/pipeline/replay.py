"""What the user's step did on the last stage, sent to all ranks and done again on each.

``self.log`` and changes of attributes inside a step that counts on one rank only would leave the
others without the values that EarlyStopping, ModelCheckpoint, schedulers, loggers and the hooks of
the module ask for. So both are recorded over the micro-batches, joined to what the batch comes to
(joining.py), sent with the loss in one message, and done on every rank.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from torch import Tensor, distributed
from torchmetrics import Metric

from lightning_align._errors import argument_error
from lightning_align.layers.surgery import replaced
from lightning_align.strategies.pipeline.joining import Joiner
from lightning_align.strategies.pipeline.messages import Packed, length_of, packed, unpacked
from lightning_align.strategies.pipeline.step_attributes import StepAttributes, Taken


@dataclass
class Part:
    """What a step did on one micro-batch.

    Attributes:
        share: Which part of the batch it is.
        output: What the step returned.
        logs: name -> (arguments of ``self.log``, value).
        changes: path of an attribute -> (value before the batch, value after the step).
    """

    share: float
    output: Any = None
    logs: dict[str, tuple[dict[str, Any], Any]] = field(default_factory=dict)
    changes: dict[str, tuple[Any, Any]] = field(default_factory=dict)


@dataclass
class StepResult:
    """What a step over all micro-batches came to.

    Attributes:
        loss: Its loss, None in evaluation.
        logs: name -> (arguments of ``self.log``, value).
        changes: path of an attribute -> its value, or what was appended to it.
        outputs: What the step returned, if anything, in evaluation.
        undecided: Values that only a comparison with the whole batch can tell.
        unseen: Values that were joined without one.
    """

    loss: Tensor | None = None
    logs: dict[str, tuple[dict[str, Any], Any]] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)
    outputs: Any = None
    undecided: tuple[str, ...] = ()
    unseen: tuple[str, ...] = ()


class Appended(NamedTuple):
    """Entries that were put behind those of a list."""

    entries: list[Any]


class MetricAt(NamedTuple):
    """A metric object that was logged, by its place in the module."""

    path: str


class StepRecorder:
    """Records what the user's step does over the micro-batches of a batch.

    Args:
        module: The user's module.
        attributes: Those of its attributes that count.
        begun: What they were when the batch began.
        shares: Which part of the batch each micro-batch is.

    Attributes:
        parts: What the step did, by micro-batch.
    """

    def __init__(
        self,
        module: pl.LightningModule,
        attributes: StepAttributes,
        begun: Taken,
        shares: Sequence[float],
    ) -> None:
        self._module, self._attributes = module, attributes
        self._begun, self._shares = begun, shares
        self._signature = inspect.signature(type(module).log)
        self.parts: list[Part] = []

    @contextmanager
    def recording(self, number: int) -> Iterator[Part]:
        """Around the step of a micro-batch; each leaves the attributes that the batch began with.

        Args:
            number: Of the micro-batch.
        """
        part = Part(self._shares[number])

        def log(*args: Any, **kwargs: Any) -> None:
            arguments = dict(self._signature.bind(self._module, *args, **kwargs).arguments)
            name, value = arguments.pop("name"), arguments.pop("value")
            del arguments["self"]
            part.logs[name] = arguments, self._value(name, value)

        # Changes are looked for behind the step, and taken back even where it fails: a comparison
        # goes on with the next micro-batch.
        try:
            with replaced(self._module, "log", log):
                yield part
            part.changes = self._attributes.changed(self._begun)
        finally:
            self._attributes.restore(self._begun)
        self.parts.append(part)

    def _value(self, name: str, value: Any) -> Any:
        if isinstance(value, Metric):
            paths = {id(part): path for path, part in self._module.named_modules()}
            if id(value) in paths:
                return MetricAt(paths[id(value)])
        is_number = isinstance(value, Tensor) and value.numel() == 1
        if not is_number and not isinstance(value, (int, float)):
            rule = f"must be a number under a pipeline, and is a {type(value).__name__}"
            way_out = "Log metric.compute(), or an attribute of the module that is a metric object"
            raise argument_error(f"{type(self._module).__name__}.log", "name", name, rule, way_out)
        return torch.as_tensor(value, device=self._module.device).detach().double().reshape(())

    def result(self, joiner: Joiner, loss: Tensor | None) -> StepResult:
        """What the batch came to.

        Args:
            joiner: Knows the rules by which values of micro-batches are joined.
            loss: Of the batch; None in evaluation, where what the step returned is joined.
        """
        result, shares = StepResult(loss), [part.share for part in self.parts]
        joiner.undecided.clear()
        joiner.unseen.clear()
        for name in dict.fromkeys(name for part in self.parts for name in part.logs):
            result.logs[name] = self._joined_log(name, joiner)
        for path in dict.fromkeys(path for part in self.parts for path in part.changes):
            before = next(part.changes[path][0] for part in self.parts if path in part.changes)
            values = [part.changes.get(path, (before, before))[1] for part in self.parts]
            value = joiner.join(path, before, values, shares)
            if isinstance(before, list) and isinstance(value, list):
                kept = len(before) <= len(value) and all(
                    a is b for a, b in zip(before, value, strict=False)
                )
                # Predictions of an epoch would be sent again with every batch.
                value = Appended(value[len(before) :]) if kept else value
            result.changes[path] = value
        outputs = [part.output for part in self.parts]
        if any(output is not None for output in outputs):
            result.outputs = joiner.join("output", None, outputs, shares)
        result.undecided = tuple(sorted(joiner.undecided))
        result.unseen = tuple(sorted(joiner.unseen - joiner.random - {"output"}))
        return result

    def _joined_log(self, name: str, joiner: Joiner) -> tuple[dict[str, Any], Any]:
        calls = [(part.share, *part.logs[name]) for part in self.parts if name in part.logs]
        arguments = {**calls[-1][1], "sync_dist": False}  # every rank gets the value
        if arguments.get("batch_size") is not None:
            arguments["batch_size"] = sum(call["batch_size"] for _, call, _ in calls)
        values = [value for *_, value in calls]
        if isinstance(values[0], MetricAt):
            return arguments, values[0]
        total = sum(share for share, *_ in calls) or 1.0
        shares = [share / total for share, *_ in calls]
        return arguments, joiner.join(log_path(name), None, values, shares)


def log_path(name: str) -> str:
    """Under which path the values of a logged name are joined."""
    return f"log {name}"


class ResultBroadcaster:
    """Sends what a step came to on the last stage: one message, unless its form has changed.

    Args:
        module: The user's module.
        attributes: Those of its attributes that count.
        source: Global rank that has the last stage.
        group: The ranks of the pipeline.
        device: Where the message is sent from.
    """

    def __init__(
        self,
        module: pl.LightningModule,
        attributes: StepAttributes,
        source: int,
        group: distributed.ProcessGroup,
        device: torch.device,
    ) -> None:
        self._module, self._attributes = module, attributes
        self._source, self._group, self._device = source, group, device
        self._forms: dict[str, tuple[int, Any]] = {}

    def broadcast(self, kind: str, own: StepResult | None) -> StepResult:
        """The result of the last stage, on all ranks; collective.

        Args:
            kind: Of which step; the messages of one kind mostly have one form.
            own: The result, None on other ranks.
        """
        version, form = self._forms.get(kind, (0, None))
        # A version, then bytes of the form that all ranks know; another version says that there is
        # another form, which follows.
        message = torch.zeros(8 + length_of(form), dtype=torch.uint8, device=self._device)
        to_send: Packed | None = None
        if own is not None:
            to_send = packed(vars(own), self._device)
            is_new = to_send.form != form
            header = torch.tensor([version + is_new]).view(torch.uint8)
            message[:8] = header.to(self._device)
            if not is_new:
                message[8:] = to_send.data
        distributed.broadcast(message, self._source, group=self._group)
        sent_version = int(message[:8].cpu().view(torch.int64))
        if sent_version == version:
            return StepResult(**unpacked(form, message[8:]))
        form, data = self.broadcast_object(to_send and (to_send.form, to_send.data.cpu()))
        self._forms[kind] = sent_version, form
        return StepResult(**unpacked(form, data.to(self._device)))

    def broadcast_object(self, value: Any) -> Any:
        """Any object of the last stage, on all ranks; collective."""
        box = [value]
        distributed.broadcast_object_list(box, self._source, group=self._group)
        return box[0]

    def replay(self, result: StepResult) -> None:
        """Do on this rank what the step did on the last stage."""
        slots: Callable[[], Any] = self._attributes.slots
        for path, change in result.changes.items():
            value = change
            if isinstance(change, Appended):
                mapping, key = slots()[path]
                value = [*mapping[key], *change.entries]
            self._attributes.assign(path, value)
        for name, (arguments, value) in result.logs.items():
            logged = value
            if isinstance(value, MetricAt):
                logged = self._module.get_submodule(value.path)
            elif isinstance(value, Tensor):
                logged = value.float()
            self._module.log(name, logged, **arguments)


def _alone() -> bool:
    """In place of torchmetrics' question whether there are other processes with other data."""
    return False


def keep_metrics_here(module: pl.LightningModule) -> Callable[[], None]:
    """Let metric objects not add up over ranks, which all have the same; returns the way back."""
    metrics = [part for part in module.modules() if isinstance(part, Metric)]
    before = [metric.distributed_available_fn for metric in metrics]
    for metric in metrics:
        metric.distributed_available_fn = _alone

    def undo() -> None:
        for metric, available in zip(metrics, before, strict=True):
            metric.distributed_available_fn = available

    return undo
