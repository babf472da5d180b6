"""Why a step is not like the others: a cause by elimination, and the figures that say so.

The weights and the batch decide a loss. One question parts them, asked of the latest healthy batch:
is its loss with the present weights what it was? If so, the weights are well, and the new batch is
to blame. If not, a step before this one did it (its learning rate had jumped, or its gradients were
large against a second moment of quieter times, arXiv:2304.13013, Section 3.4), or something wrote
to the weights that is no step. Where nobody can ask that question, the size of the latest steps and
what the weights did between them say as much in most cases.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import Literal

CauseKind = Literal["data", "learning rate", "stale second moment", "numerics", "unknown"]
Histories = dict[str, list[float]]  # layer -> a value for each step, oldest first

RECENT = 5  # steps before the alarm in which what hurts the weights is looked for
LR_JUMP = 1.5  # of a step's learning rate over that of the one before; a warm-up has less
LARGE_RATIO = 3.0  # of RMS(g / sqrt(v)), which is 1 where v knows such gradients
RAISED = 3.0  # of a figure over its own median
LOUD = 4.0  # robust standard deviations of the loss


@dataclass
class Cause:
    """Why an incident came about.

    Attributes:
        kind: "data", "learning rate", "stale second moment", "numerics" or "unknown".
        layer: The layer it is in, where it is in one.
        text: A sentence with the figures.
        figures: These figures by name.
    """

    kind: CauseKind
    layer: str | None = None
    text: str = ""
    figures: dict[str, float] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Kind and layer in a few words."""
        return self.kind if self.layer is None else f"{self.kind} in {self.layer}"


@dataclass
class Evidence:
    """What is known when an alarm is raised, before its step.

    Each history has a value for every step, NaN where it is unknown; the last one is the alarm's.

    Attributes:
        losses: Mean loss of the window.
        lrs: Learning rate, the largest of all parameter groups.
        grad_norms: Norm of the gradient by layer, layers in the order of the forward.
        gradient_ratios: RMS of g / sqrt(v) by layer, v the second moment with this gradient in it.
        updates: RMS of the change by the step over that of the weights, by layer. The alarm's is
            unknown.
        outside: The same of what changed the weights between the step before and this one.
        weight_norms: Norm of the weights by layer, before some of the steps and before the alarm's.
        moved: What steps moved them by since the norm before, summed over these, in the RMS of the
            change over that of the weights; of the same steps.
        batch_losses: Of each batch of the window.
        reference: Loss of the latest window without an alarm, when it was learned from, and with
            the present weights; None where it was not computed again.
        broken_layer: The first layer whose output is not finite in a forward of the window.
        broken_data: Whether the batches themselves hold NaN or infinity.
        previous: Cause of an incident of the latest steps whose step was taken.
    """

    losses: list[float] = field(default_factory=list)
    lrs: list[float] = field(default_factory=list)
    grad_norms: Histories = field(default_factory=dict)
    gradient_ratios: Histories = field(default_factory=dict)
    updates: Histories = field(default_factory=dict)
    outside: Histories = field(default_factory=dict)
    weight_norms: Histories = field(default_factory=dict)
    moved: Histories = field(default_factory=dict)
    batch_losses: list[float] = field(default_factory=list)
    reference: tuple[float, float] | None = None
    broken_layer: str | None = None
    broken_data: bool = False
    previous: Cause | None = None


def name_cause(evidence: Evidence) -> Cause:
    """The likeliest cause of an alarm, with the figures that say so; pure."""
    excess, scale = loss_excess(evidence.losses)
    share = _share_of_weights(evidence, excess, scale)
    weights_are_well = share is not None and share < 0.5
    broken = _broken(evidence)
    if broken is not None and (broken.kind == "data" or _lr_jump(evidence.lrs) is None):
        return broken
    foreign = _written_from_outside(evidence)
    if foreign is not None and not weights_are_well:
        return foreign
    figures = {"loss": _last(evidence.losses), "usual_loss": _last(evidence.losses) - excess}
    if evidence.reference is not None:
        figures |= dict(zip(("healthy_loss", "healthy_loss_now"), evidence.reference, strict=True))
    if not weights_are_well:
        if evidence.previous is not None:
            return _follows(evidence.previous, figures)
        for find in (_learning_rate, _stale_before, _unexplained_update):
            if (cause := find(evidence)) is not None:
                cause.figures |= figures
                return cause
    if abs(excess) > LOUD * scale and (weights_are_well or share is None):
        return _data(evidence, figures)
    if abs(excess) <= LOUD * scale and (cause := _stale_now(evidence)) is not None:
        cause.figures |= figures
        return cause
    return Cause("unknown", None, "No figure that is watched stands out.", figures)


def loss_excess(losses: Sequence[float]) -> tuple[float, float]:
    """(last loss less the median of those before, their robust standard deviation).

    The deviation is that of differences between neighbours, so a trend adds nothing to it, and at
    least 1 % of the loss.
    """
    before = [loss for loss in losses[:-1] if math.isfinite(loss)][-32:]
    if not before or not losses:
        return 0.0, math.inf
    middle = median(before)
    steps = [abs(b - a) for a, b in pairwise(before)]
    # Normal noise: the median of |difference| is 0.6745 * sqrt(2) standard deviations.
    scale = median(steps) / 0.954 if steps else 0.0
    return losses[-1] - middle, max(scale, 0.01 * abs(middle), 1e-12)


def scores(history: Sequence[float]) -> list[float]:
    """Each value's distance from the history's middle, in robust standard deviations of its log.

    Args:
        history: Positive values of the steps; the latest ``RECENT`` and the last are judged by the
            median and the median absolute deviation of those before.

    Returns:
        Scores of the latest ``RECENT + 1`` values, oldest first; infinite for what is not finite.
    """
    judged = history[-RECENT - 1 :]
    logs = [math.log(v) for v in history[: -RECENT - 1] if math.isfinite(v) and v > 0]
    if len(logs) < 8:
        return [0.0 if math.isfinite(v) else math.inf for v in judged]
    middle = median(logs)
    # 1.4826 turns the MAD of normal noise into its standard deviation.
    scale = max(1.4826 * median(abs(log - middle) for log in logs), 0.05)
    return [
        (math.log(v) - middle) / scale if v > 0 else -math.inf if v <= 0 else math.inf
        for v in (value if math.isfinite(value) else math.inf for value in judged)
    ]


def first_to_leave(histories: Mapping[str, Sequence[float]], threshold: float = 5.0) -> list[str]:
    """Layers whose gradient norm left its own history earliest, the farthest first.

    A layer has left it at the first of the latest steps from which on its score is above the
    threshold up to the last step.
    """
    left: dict[str, tuple[int, float]] = {}
    for layer, history in histories.items():
        if (since := left_since(history, threshold)) is not None:
            left[layer] = (since, scores(history)[-1])
    if not left:
        return []
    first = max(since for since, _ in left.values())
    found = [layer for layer, (since, _) in left.items() if since == first]
    return sorted(found, key=lambda layer: -left[layer][1])


def left_since(history: Sequence[float], threshold: float = 5.0) -> int | None:
    """How many steps ago a layer left its own history for good; None if it is in it."""
    since = None
    for ago, score in enumerate(reversed(scores(history))):
        if not score > threshold:
            break
        since = ago
    return since


def _share_of_weights(evidence: Evidence, excess: float, scale: float) -> float | None:
    """How much of the excess loss a healthy batch has as well; None where nobody can say."""
    if evidence.reference is None:
        return None
    then, now = evidence.reference
    if not math.isfinite(now):
        return math.inf
    if abs(now - then) < LOUD / 2 * scale:
        return 0.0
    return (now - then) / excess if abs(excess) > scale else math.inf


def _broken(evidence: Evidence) -> Cause | None:
    """NaN and infinity: in the batch, in weights, in a layer's output, or in its gradient."""
    values = [_last(evidence.losses), *map(_last, evidence.grad_norms.values())]
    weights = [n for n, norms in evidence.weight_norms.items() if math.isinf(_last_or(norms))]
    if weights:
        text = f"The weights of {weights[0]} are not finite."
        return Cause("numerics", weights[0], text, {"layers_with_nonfinite_weights": len(weights)})
    if all(math.isfinite(value) for value in values):
        return None
    if evidence.broken_data:
        return Cause("data", None, "The batch itself holds numbers that are not finite.")
    if evidence.broken_layer is not None:
        text = f"The output of {evidence.broken_layer} is the first that is not finite."
        return Cause("numerics", evidence.broken_layer, text)
    broken = [n for n, norms in evidence.grad_norms.items() if not math.isfinite(_last(norms))]
    figures = {"layers_with_nonfinite_gradients": float(len(broken))}
    if broken and len(broken) < len(evidence.grad_norms):
        # The backward goes from the last layer to the first: what is behind it is still finite.
        text = f"The gradient is finite up to {broken[-1]}, where the backward breaks."
        return Cause("numerics", broken[-1], text, figures)
    return Cause("numerics", None, "Loss and gradients are not finite, the weights are.", figures)


def _written_from_outside(evidence: Evidence) -> Cause | None:
    """Weights that have changed since the last step, by something that is no step."""
    found: dict[str, tuple[float, float]] = {}
    for layer, history in evidence.outside.items():
        usual_update = typical(evidence.updates.get(layer, []))
        usual = max(typical(history), usual_update, 1e-7)
        change = max(_recent(history), default=0.0)
        # A few weights out of many are not among those that are looked at one by one.
        change = max(change, _jump_of_norm(evidence, layer))
        if change > 10 * usual and change > 1e-3:
            found[layer] = (change, usual)
    if not found:
        return None
    layer = max(found, key=lambda name: found[name][0] / found[name][1])
    change, usual = found[layer]
    text = f"The weights of {layer} changed by {change:.3g} of their size without a step."
    return Cause("numerics", layer, text, {"change": change, "usual_change": usual})


def _jump_of_norm(evidence: Evidence, layer: str) -> float:
    """Relative change of a layer's weight norm that steps since the last one do not explain."""
    norms = evidence.weight_norms.get(layer, [])
    if len(norms) < 2 or not (norms[-1] > 0 and norms[-2] > 0):
        return 0.0
    changed = math.sqrt(abs(norms[-1] ** 2 - norms[-2] ** 2)) / norms[-2]
    # |w + u|^2 - |w|^2 = 2 w.u + |u|^2 <= 2 |w| |u| + |u|^2, in shares of |w|.
    moved = _last(evidence.moved.get(layer, []))
    explained = math.sqrt(2 * moved + moved**2)
    return changed if changed > 2 * explained else 0.0


def _lr_jump(lrs: Sequence[float]) -> tuple[float, float] | None:
    """(learning rate before, after) of the largest jump in the latest steps, if there is one."""
    # The alarm's own learning rate has moved nothing yet.
    steps = list(pairwise(lrs[:-1]))[-RECENT - 1 :]
    jumps = [(a, b) for a, b in steps if a > 0 and b / a >= LR_JUMP]
    return max(jumps, key=lambda pair: pair[1] / pair[0]) if jumps else None


def _learning_rate(evidence: Evidence) -> Cause | None:
    jump = _lr_jump(evidence.lrs)
    if jump is None:
        return None
    before, after = jump
    text = f"The learning rate went from {before:.3g} to {after:.3g}, and the weights got worse."
    figures = {"lr_before": before, "lr_after": after}
    return Cause("learning rate", None, text, figures)


def _stale_before(evidence: Evidence) -> Cause | None:
    """Steps just before the alarm with gradients that the second moment did not know."""
    found = {
        layer: (max(_recent(history[:-1]), default=0.0), typical(history))
        for layer, history in evidence.gradient_ratios.items()
    }
    return _stale(found, "and the weights got worse")


def _stale_now(evidence: Evidence) -> Cause | None:
    """A usual loss, with gradients that the second moment does not know."""
    found = {n: (_last(h), typical(h)) for n, h in evidence.gradient_ratios.items() if h}
    return _stale(found, "while the loss is a usual one")


def _stale(found: Mapping[str, tuple[float, float]], and_so: str) -> Cause | None:
    large = {
        layer: (ratio, usual)
        for layer, (ratio, usual) in found.items()
        if ratio >= LARGE_RATIO and ratio >= RAISED * usual
    }
    if not large:
        return None
    layer = max(large, key=lambda name: large[name][0])
    ratio, usual = large[layer]
    text = (
        f"The gradients of {layer} are {ratio:.3g} times the square root of their second moment"
        f" (usually {usual:.3g}), {and_so}."
    )
    return Cause("stale second moment", layer, text, {"ratio": ratio, "usual_ratio": usual})


def _unexplained_update(evidence: Evidence) -> Cause | None:
    """A step that was larger than ever, though neither gradients nor learning rate were."""
    found = {}
    for layer, history in evidence.updates.items():
        usual = typical(history)
        update = max(_recent(history[:-1]), default=0.0)
        if usual > 0 and update > 10 * usual:
            found[layer] = (update, usual)
    if not found:
        return None
    layer = max(found, key=lambda name: found[name][0] / found[name][1])
    update, usual = found[layer]
    figures = {"update": update, "usual_update": usual}
    if len(found) > max(1, len(evidence.updates) // 2):
        text = f"The steps moved weights {update / usual:.3g} times as far as usual."
        return Cause("learning rate", None, text, figures)
    text = f"The weights of {layer} moved {update / usual:.3g} times as far as usual."
    return Cause("numerics", layer, text, figures)


def _data(evidence: Evidence, figures: dict[str, float]) -> Cause:
    text = f"The loss of this window is {figures['loss']:.4g} where {figures['usual_loss']:.4g}"
    text += " is usual"
    if evidence.reference is not None:
        then, now = evidence.reference
        text += f", and the batch before it still has {now:.4g} (was {then:.4g})"
    if len(evidence.batch_losses) > 1:
        worst = max(range(len(evidence.batch_losses)), key=evidence.batch_losses.__getitem__)
        figures["worst_batch"] = float(worst)
        figures["worst_batch_loss"] = evidence.batch_losses[worst]
    return Cause("data", None, f"{text}.", figures)


def _follows(previous: Cause, figures: dict[str, float]) -> Cause:
    text = f"The weights are still worse from the incident before: {previous.text}"
    return Cause(previous.kind, previous.layer, text, previous.figures | figures)


def _last(history: Sequence[float]) -> float:
    return history[-1] if history else 0.0


def _last_or(history: Sequence[float]) -> float:
    """The last value, infinite for NaN too."""
    value = _last(history)
    return value if math.isfinite(value) else math.inf


def typical(history: Sequence[float]) -> float:
    """Median of a history before its latest steps, or of all before the last if that is little."""
    before = [v for v in history[: -RECENT - 1] if math.isfinite(v)]
    if len(before) < 8:
        before = [v for v in history[:-1] if math.isfinite(v)]
    return median(before) if before else 0.0


def _recent(history: Sequence[float]) -> list[float]:
    return [v for v in history[-RECENT:] if math.isfinite(v)]
