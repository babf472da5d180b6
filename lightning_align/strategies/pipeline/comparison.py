"""Whether micro-batches come to what the same rows come to in one piece.

A step may do what micro-batches cannot: a loss that is a mean over an uneven number of labels, a
ratio that is logged, a counter of batches. So before any weight changes a few rows of a batch are
run in one piece and in micro-batches, the modules below the user's in evaluation mode, which drops
nothing out. What the step returned, logged and changed in the module tells which rule joins each
value (joining.py). A value that no rule makes is refused; one that is random cannot be compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn

from lightning_align._compat.torch_modules import has_spectral_norm
from lightning_align._errors import argument_error
from lightning_align.run.protocols import loss_is_sum
from lightning_align.strategies.pipeline import joining
from lightning_align.strategies.pipeline.replay import MetricAt, Part, log_path
from lightning_align.strategies.pipeline.step_attributes import StepAttributes

_TOLERANCE = 2e-5  # what another order of sums may change, relative
_TOLERANCE_16 = 1e-2  # with 8 to 11 bits of mantissa
_FORWARD_CACHE = "._forward_cache"  # what a metric object has of the latest batch alone


class Finding(NamedTuple):
    """A value of the batch that micro-batches do not come to."""

    path: str
    error: str


@dataclass
class Verdict:
    """What a comparison has found, sent to all ranks.

    Attributes:
        error: Why the run is refused, or None.
        failed: Why there was nothing to compare, or None.
        warnings: What could not be found out.
    """

    error: str | None = None
    failed: str | None = None
    warnings: list[str] = field(default_factory=list)


def tolerance_of(module: pl.LightningModule) -> float:
    """Relative difference that rounding makes in the run's precision."""
    precise = {torch.float32, torch.float64}
    dtypes = {p.dtype for p in module.parameters() if p.is_floating_point()}
    mixed = str(module.trainer.precision).startswith(("32", "64")) is False
    rough = module.device.type != "cpu" and torch.get_float32_matmul_precision() != "highest"
    return _TOLERANCE_16 if mixed or rough or dtypes - precise else _TOLERANCE


@contextmanager
def leaving_no_trace(module: pl.LightningModule) -> Iterator[None]:
    """Around a comparison: layers drop nothing out, and everything is as it was behind it."""
    was_training = [(part, part.training) for part in module.modules() if part is not module]
    device = module.device
    with isolate_rng(include_cuda=device.type == "cuda"), StepAttributes(module).untouched():
        try:
            for part, _ in was_training:
                part.training = False
            with torch.no_grad():
                yield
        finally:
            for part, training in was_training:
                part.training = training


def findings(
    module: Any,
    joiner: joining.Joiner,
    whole: Part,
    parts: Sequence[Part],
    *,
    trains: bool,
) -> list[Finding]:
    """Learn the rules of all values; those that have none.

    Args:
        module: The user's module.
        joiner: Keeps the rules that are found.
        whole: What the step did on the rows in one piece.
        parts: What it did on their micro-batches.
        trains: Whether it returned a loss.
    """
    shares = [part.share for part in parts]
    found: list[Finding] = []
    if trains:
        found += _of_loss(module, joiner, whole, parts)
    elif whole.output is not None:
        outputs = [part.output for part in parts]
        try:
            joiner.learn("output", None, outputs, whole.output, shares)
        except joining.Mismatch as mismatch:
            found.append(Finding("output", _of_output(module, mismatch)))
    unknown: set[str] = set()
    for path in dict.fromkeys(path for part in (whole, *parts) for path in part.changes):
        before = next(p.changes[path][0] for p in (whole, *parts) if path in p.changes)
        after, *values = (p.changes.get(path, (before, before))[1] for p in (whole, *parts))
        try:
            joiner.learn(path, before, values, after, shares)
        except joining.Mismatch as mismatch:
            if path.endswith(_FORWARD_CACHE):  # refused where it is logged
                joiner.rules[path] = ["mean"]
                unknown.add(path.removesuffix(_FORWARD_CACHE))
            else:
                found.append(Finding(path, _of_attribute(module, mismatch)))
    for name, (arguments, value) in whole.logs.items():
        having = [part for part in parts if name in part.logs]
        if isinstance(value, MetricAt):
            found += _of_metric(module, name, arguments, value.path in unknown)
        else:
            found += _of_log(module, joiner, name, value, having)
    return found


def judge(
    module: Any,
    joiner: joining.Joiner,
    whole: Part,
    parts: Sequence[Part],
    again: Part,
    *,
    trains: bool,
) -> Verdict:
    """Whether micro-batches come to the same.

    Args:
        module: The user's module.
        joiner: Learns the rules.
        whole: What the step did on the rows in one piece.
        parts: What it did on their micro-batches.
        again: What it did on the rows in one piece with other random numbers.
        trains: Whether it returned a loss.
    """
    verdict, random = Verdict(), []
    for found in findings(module, joiner, whole, parts, trains=trains):
        if found.path in joiner.random:
            continue
        if is_random(found.path, whole, again, joiner.tolerance):
            random.append(found.path)
        else:
            verdict.error = verdict.error or found.error
    joiner.random.update(random)
    if random:
        told = f"PipelineStrategy: in {type(module).__name__} {', '.join(random)} is another with"
        told += " other random numbers, so that nothing says whether micro-batches come to the"
        verdict.warnings.append(f"{told} same as a batch in one piece")
    return verdict


def is_random(path: str, whole: Part, again: Part, tolerance: float) -> bool:
    """Whether a value differs between two runs of the same rows that drew other numbers."""
    if path == "loss":
        return joining.distance(whole.output, again.output) > tolerance
    if path.startswith("log "):
        name = path.removeprefix("log ")
        if name not in again.logs or isinstance(whole.logs[name][1], MetricAt):
            return name not in again.logs
        return joining.distance(whole.logs[name][1], again.logs[name][1]) > tolerance
    try:
        joiner = joining.Joiner(tolerance)
        if path == "output":
            joiner.learn(path, None, [again.output], whole.output, [1.0])
        else:
            before, now = whole.changes.get(path, (None, None))
            joiner.learn(path, before, [again.changes.get(path, (before, before))[1]], now, [1.0])
    except joining.Mismatch:
        return True
    return False


def _of_loss(
    module: Any, joiner: joining.Joiner, whole: Part, parts: Sequence[Part]
) -> list[Finding]:
    is_sum = loss_is_sum(module)
    losses = torch.stack([joining.as_tensor(part.output) for part in parts])
    shares = losses.new_tensor([part.share for part in parts])
    ours = losses.sum() if is_sum else (losses * shares).sum()
    if joining.distance(ours, whole.output) <= joiner.tolerance:
        return []
    name, theirs = type(module).__name__, float(whole.output)
    rule = f"the loss of {len(losses)} micro-batches comes to {float(ours):.6g}, and that of the"
    rule += f" same rows in one piece is {theirs:.6g}"
    if not is_sum and joining.distance(losses.sum(), whole.output) <= joiner.tolerance:
        way_out = 'It is a sum: give the module the attribute loss_reduction = "sum"'
    elif is_sum and joining.distance((losses * shares).sum(), whole.output) <= joiner.tolerance:
        way_out = 'It is a mean: set loss_reduction = "mean"'
    else:
        way_out = "Define pipeline_microbatch_weight(batch), how many values its mean is over, or"
        way_out += f' return a sum and set loss_reduction = "sum"; or {_IN_ONE_PIECE}'
    if counted := [path for path, (_, value) in whole.changes.items() if joining.is_number(value)]:
        rule += f"; its step changes {counted[:3]}, which are those of a micro-batch within it"
        way_out = f"If the loss goes by them, change them in on_train_batch_start. Else: {way_out}"
    return [Finding("loss", str(argument_error("PipelineStrategy", "model", name, rule, way_out)))]


def _of_metric(
    module: Any, name: str, arguments: dict[str, Any], is_unknown: bool
) -> list[Finding]:
    on_step = arguments.get("on_step")
    if not is_unknown or not (module.training if on_step is None else on_step):
        return []
    where = f"{type(module).__name__}.log"
    rule = "what a metric object is for a batch is not known from its micro-batches"
    way_out = "Log it with on_step=False, on_epoch=True"
    return [Finding(log_path(name), str(argument_error(where, "name", name, rule, way_out)))]


def _of_log(
    module: Any, joiner: joining.Joiner, name: str, value: Any, having: Sequence[Part]
) -> list[Finding]:
    where, path = f"{type(module).__name__}.log", log_path(name)
    if not having:
        rule = "it is logged for all rows in one piece, and for none of their micro-batches"
        return [Finding(path, str(argument_error(where, "name", name, rule, _LOG_WAY_OUT)))]
    values = [part.logs[name][1] for part in having]
    total = sum(part.share for part in having) or 1.0
    try:
        joiner.learn(path, None, values, value, [part.share / total for part in having])
    except joining.Mismatch:
        told = ", ".join(f"{float(v):.4g}" for v in values[:4])
        rule = f"it is {float(value):.6g} for some rows in one piece, which is no mean, sum,"
        rule += f" largest or smallest value of their micro-batches' {told}"
        return [Finding(path, str(argument_error(where, "name", name, rule, _LOG_WAY_OUT)))]
    return []


_IN_ONE_PIECE = 'use schedule="GPipe", num_microbatches=1'
_LOG_WAY_OUT = f"Log it at the end of the epoch, from sums or a metric object; or {_IN_ONE_PIECE}"


def _of_attribute(module: Any, mismatch: joining.Mismatch) -> str:
    rule = f"its step changes {mismatch.path!r}"
    values = [mismatch.whole, *mismatch.parts]
    if all(joining.is_number(value) for value in values):
        told = ", ".join(f"{float(v):.4g}" for v in mismatch.parts[:4])
        rule += f" to {float(mismatch.whole):.6g} for some rows in one piece, and to {told} for"
        rule += " their micro-batches, which do not add up to it"
    else:
        rule += " to something that its micro-batches do not come to"
    way_out = f"Change it in on_train_batch_end or at the end of the epoch; or {_IN_ONE_PIECE}"
    name = type(module).__name__
    return str(argument_error("PipelineStrategy", "model", name, rule, way_out))


def _of_output(module: Any, mismatch: joining.Mismatch) -> str:
    rule = f"what its step returns ({mismatch.path}) for some rows in one piece is not what their"
    rule += " micro-batches come to"
    name, way_out = type(module).__name__, f"Return nothing, or {_IN_ONE_PIECE}"
    return str(argument_error("PipelineStrategy", "model", name, rule, way_out))


_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def keeps_statistics(module: nn.Module) -> list[str]:
    """Layers whose statistics, or power iterations, are those of a micro-batch."""
    named = module.named_modules()
    return [name for name, p in named if isinstance(p, _NORMS) or has_spectral_norm(p)]
