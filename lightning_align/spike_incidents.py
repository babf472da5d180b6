"""An incident: one step that was not like the others, with all that is known of it, as plain data.

The guard makes one per alarm, the evidence fills in batches, layers and cause, and the report
writes it as JSON, which ``lightning-align spikes`` reads again.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from lightning_align._errors import argument_error
from lightning_align.spike_causes import Cause
from lightning_align.stability import SpikeVerdict

# JSON has no words for these numbers, and a loss of NaN is what an incident is often about.
_NUMBERS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


@dataclass
class BatchRecord:
    """One batch of the window that a step was to learn from, on one rank.

    Attributes:
        position: Number of the batch in the stream, skipped ones counted.
        rank: The rank that had it.
        loss: Mean loss, before the step.
        loss_after: The same batch after the step or the rewind; None where it was not computed.
        samples: Indices of its samples in the dataset, where the sampler can tell.
        preview: Beginning of its rows as text.
    """

    position: int
    rank: int = 0
    loss: float | None = None
    loss_after: float | None = None
    samples: list[int] = field(default_factory=list)
    preview: list[str] = field(default_factory=list)


@dataclass
class LayerRecord:
    """What one layer did at an incident.

    Attributes:
        name: Name of the layer.
        score: How far its gradient norm is above its own history, in robust standard deviations
            of the logarithm.
        since: Steps before the incident at which it left its history; 0 is the incident's.
        grad_norm: Norm of its gradient.
        usual_grad_norm: Median of its history.
        update: Root mean square of its latest update over that of its weights.
        usual_update: Median of its history.
        gradient_ratio: RMS of g / sqrt(v), v the second moment with this gradient in it.
        usual_gradient_ratio: Median of its history.
    """

    name: str
    score: float | None = None
    since: int | None = None
    grad_norm: float | None = None
    usual_grad_norm: float | None = None
    update: float | None = None
    usual_update: float | None = None
    gradient_ratio: float | None = None
    usual_gradient_ratio: float | None = None


@dataclass
class Incident:
    """An alarm and what became of it.

    Attributes:
        step: Number of the optimizer step that the alarm came before.
        position: Number of the first batch of its window in the stream, skipped ones counted.
        num_batches: Batches of the window on each rank.
        epoch: Epoch of the step.
        loss: Mean loss of the window.
        grad_norm: Norm of its gradient, None where it was not known.
        reason: Why it was an alarm, in words.
        loss_score: Error of the loss's forecast, in standard deviations.
        norm_score: The same of the gradient norm.
        loss_threshold: What the score of the loss was not to exceed.
        norm_threshold: What the score of the norm was not to exceed.
        loss_limit: The same in units of the loss.
        norm_limit: The same in units of the norm.
        action: What was done: "log", "clip", "skip", "rewind" or "stop".
        rewound_to: Position that a rewind went back to.
        skipped: Ranges [begin, end) of positions that were left out because of it.
        batches: The batches of the window, of all ranks.
        layers: Layers in the order of the forward.
        first_layers: Names of the layers that left their own history first.
        cause: Why it came about.
        lrs: Learning rate of the steps up to it, the last one its own.
        history: ``{"step": [...], "loss": [...], "grad_norm": [...]}`` of the steps up to it.
        missing: What could not be looked at, and why.
        stream: What tells the stream of batches from another, as plain data.
        notes: What else there is to know, such as checkpoints that hold the step.
    """

    step: int
    position: int
    num_batches: int
    epoch: int
    loss: float
    grad_norm: float | None = None
    reason: str = ""
    loss_score: float | None = None
    norm_score: float | None = None
    loss_threshold: float | None = None
    norm_threshold: float | None = None
    loss_limit: float | None = None
    norm_limit: float | None = None
    action: str = "log"
    rewound_to: int | None = None
    skipped: list[list[int]] = field(default_factory=list)
    batches: list[BatchRecord] = field(default_factory=list)
    layers: list[LayerRecord] = field(default_factory=list)
    first_layers: list[str] = field(default_factory=list)
    cause: Cause | None = None
    lrs: list[float] = field(default_factory=list)
    history: dict[str, list[float]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    stream: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, verdict: SpikeVerdict, **known: Any) -> Incident:
        """The incident of a verdict, with what else is known of it: position, action, ..."""
        shared = {each.name for each in fields(cls)} & {each.name for each in fields(verdict)}
        return cls(**{name: getattr(verdict, name) for name in shared}, **known)

    def to_json(self) -> str:
        """The incident as JSON that any reader takes."""
        return json.dumps(_plain(asdict(self)), indent=1, ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(
        cls,
        text: str,
        source: str = "...",
        *,
        where: str = "Incident.from_json",
        argument: str = "source",
    ) -> Incident:
        """The incident that ``to_json`` wrote; unknown fields of a later version are left out.

        Args:
            text: The JSON.
            source: Where it comes from, for the message.
            where: What the user called.
            argument: Name of the argument that led to the source.

        Raises:
            ValueError: If it is none.
        """
        try:
            incident: Incident = _build(cls, json.loads(text))
            return incident
        except (ValueError, TypeError, AttributeError) as error:
            rule = f"is no report of an incident: {error}"
            raise argument_error(where, argument, source, rule) from error


_NESTED: dict[str, Any] = {"batches": BatchRecord, "layers": LayerRecord, "cause": Cause}
_TEXTS = ("preview", "reason", "notes", "missing", "text", "stream")


def _build(kind: Any, values: dict[str, Any]) -> Any:
    known = {each.name for each in fields(kind)}
    given = {}
    for name, value in values.items():
        if name not in known:
            continue
        if kind is Incident and name in _NESTED and value is not None:
            inner = _NESTED[name]
            many = isinstance(value, list)
            value = [_build(inner, each) for each in value] if many else _build(inner, value)
        elif name not in _TEXTS:
            value = _numbers(value)
        given[name] = value
    return kind(**given)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if value != value else "Infinity" if value > 0 else "-Infinity"
    return value


def _numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _numbers(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_numbers(each) for each in value]
    return _NUMBERS.get(value, value) if isinstance(value, str) else value
