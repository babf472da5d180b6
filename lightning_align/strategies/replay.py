"""What the user's step did on the last stage, told to all ranks and done again on each.

``self.log`` inside a step that only one rank runs would leave the others without the value that
EarlyStopping, ModelCheckpoint and the loggers ask for. So the calls are recorded over the
micro-batches, averaged, sent with the loss in one tensor, and made on every rank.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from torch import Tensor, distributed

from lightning_align._errors import argument_error
from lightning_align.strategies.chain import replaced

# Running sums that a module collects in its steps, by attribute: read on all ranks later on.
SUMS = ("accumulated", "evaluated")


@dataclass
class Told:
    """What a step over all micro-batches came to.

    Attributes:
        loss: Its loss, None in evaluation.
        logs: name -> (arguments of ``self.log``, value).
        sums: attribute of the module -> name -> tensor.
        outputs: What the step returned, if anything, in evaluation.
    """

    loss: Tensor | None = None
    logs: dict[str, tuple[dict[str, Any], Tensor]] = field(default_factory=dict)
    sums: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    outputs: Any = None


class LogRecorder:
    """Records ``self.log`` of a module over the micro-batches of a batch."""

    def __init__(self, module: pl.LightningModule) -> None:
        self._module = module
        self._signature = inspect.signature(type(module).log)
        self._calls: dict[str, list[tuple[float, dict[str, Any]]]] = {}

    @contextmanager
    def recording(self, weight: float) -> Iterator[None]:
        """Around the step of a micro-batch that is this share of the batch."""

        def log(*args: Any, **kwargs: Any) -> None:
            arguments = dict(self._signature.bind(self._module, *args, **kwargs).arguments)
            arguments["value"] = self._number(arguments["name"], arguments["value"])
            self._calls.setdefault(arguments["name"], []).append((weight, arguments))

        with replaced(self._module, "log", log):
            yield

    def _number(self, name: str, value: Any) -> Tensor:
        if not isinstance(value, (Tensor, int, float)) or (
            isinstance(value, Tensor) and value.numel() != 1
        ):
            rule = f"must be a number under a pipeline, and is a {type(value).__name__}"
            way_out = "Log metric.compute(), or log the metric at the end of the epoch"
            raise argument_error(f"{type(self._module).__name__}.log", "name", name, rule, way_out)
        return torch.as_tensor(value, device=self._module.device).detach().double().reshape(())

    def values(self) -> dict[str, tuple[dict[str, Any], Tensor]]:
        """Name -> (arguments for the whole batch, value of the whole batch)."""
        return {name: self._whole(calls) for name, calls in self._calls.items()}

    @staticmethod
    def _whole(calls: list[tuple[float, dict[str, Any]]]) -> tuple[dict[str, Any], Tensor]:
        arguments = {k: v for k, v in calls[-1][1].items() if k not in ("self", "name", "value")}
        arguments |= {"sync_dist": False}  # every rank gets the value
        if arguments.get("batch_size") is not None:
            arguments["batch_size"] = sum(call["batch_size"] for _, call in calls)
        values = torch.stack([call["value"] for _, call in calls])
        reduction = arguments.get("reduce_fx", "mean")
        reduction = getattr(reduction, "__name__", reduction)
        if reduction == "mean":
            weights = torch.tensor([weight for weight, _ in calls]).to(values)
            return arguments, (values * weights).sum() / weights.sum()
        return arguments, getattr(values, reduction)()


class Teller:
    """Sends what the last stage has to tell: one tensor, unless its form has changed.

    Args:
        module: The user's module.
        source: Global rank that has the last stage.
        group: The ranks of the pipeline.
        device: Where the tensor is sent from.
    """

    def __init__(
        self,
        module: pl.LightningModule,
        source: int,
        group: distributed.ProcessGroup,
        device: torch.device,
    ) -> None:
        self._module, self._source, self._group, self._device = module, source, group, device
        self._form: Any = None
        self._version = 0
        self._capacity = 64  # numbers in a message, on all ranks alike

    def tell(self, told: Told | None) -> Told:
        """What the last stage gives here, on all ranks; collective."""
        message = torch.zeros(self._capacity, dtype=torch.float64, device=self._device)
        form, numbers = None, message[1:]
        if told is not None:
            form, numbers = _flattened(told, message)
            is_new = form != self._form or len(numbers) >= self._capacity
            message[0] = self._version + is_new
            if not is_new:
                message[1 : 1 + len(numbers)] = numbers
        distributed.broadcast(message, self._source, group=self._group)
        if int(message[0]) != self._version:
            form, numbers = self._object((form, numbers.cpu()))
            self._form, self._version = form, int(message[0])
            self._capacity = max(self._capacity, 2 * len(numbers))
        else:
            numbers = message[1:]
        heard = _unflattened(self._form, numbers.to(self._device))
        if self._form.outputs:
            heard.outputs = self._object(told.outputs if told is not None else None)
        return heard

    def _object(self, value: Any) -> Any:
        box = [value]
        distributed.broadcast_object_list(box, self._source, group=self._group)
        return box[0]

    def replay(self, told: Told) -> None:
        """Do on this rank what the step did on the last stage."""
        for attribute, sums in told.sums.items():
            getattr(self._module, attribute).clear()
            getattr(self._module, attribute).update(sums)
        for name, (arguments, value) in told.logs.items():
            self._module.log(name, value.float(), **arguments)


class _Form(NamedTuple):
    """What the numbers of a message mean."""

    loss: bool
    logs: dict[str, dict[str, Any]]
    sums: list[tuple[str, str, tuple[int, ...], torch.dtype]]
    outputs: bool


def _flattened(told: Told, like: Tensor) -> tuple[_Form, Tensor]:
    logs = {name: arguments for name, (arguments, _) in told.logs.items()}
    entries = [(a, n, tensor) for a, sums in told.sums.items() for n, tensor in sums.items()]
    form = _Form(
        told.loss is not None,
        logs,
        [(a, name, tuple(tensor.shape), tensor.dtype) for a, name, tensor in entries],
        told.outputs is not None,
    )
    tensors = [*([] if told.loss is None else [told.loss])]
    tensors += [value for _, value in told.logs.values()] + [tensor for *_, tensor in entries]
    return form, torch.cat([like[:0], *(tensor.detach().to(like).flatten() for tensor in tensors)])


def _unflattened(form: _Form, numbers: Tensor) -> Told:
    told, begin = Told(), 0

    def take(count: int) -> Tensor:
        nonlocal begin
        begin += count
        return numbers[begin - count : begin]

    if form.loss:
        told.loss = take(1)[0].float()
    told.logs = {name: (arguments, take(1)[0]) for name, arguments in form.logs.items()}
    for attribute, name, shape, dtype in form.sums:
        value = take(math.prod(shape)).reshape(shape).to(dtype, copy=True)
        told.sums.setdefault(attribute, {})[name] = value
    return told
