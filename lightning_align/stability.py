"""Is this step a spike? A verdict from the loss and the gradient norm, before the step is taken.

Each of the two signals is forecast one step ahead from the medians of its last values, and the
error of the forecast is measured in robust standard deviations of earlier errors: the score. How
high a score may be is read off the run's own errors, from how far those go that go far. So neither
the scale of the noise nor the weight of its tails is a setting.

Spikes would spoil what is learned so. What was flagged never enters, nor does the tail learn from
the steps around an alarm: the beginning and the end of a spike look like a heavy tail.

Pure: numbers in, numbers out, plain data as state. Nothing here knows of tensors or a trainer.
"""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, NamedTuple

from lightning_align._errors import argument_error, check_least

MAD_TO_STD = 1.4826  # 1 / Phi^-1(3/4): of normal noise, the MAD times this is the std
# Noise that is taken to be there in any run: a rise within it is no harm, however calm the run.
LEAST_LOSS_STD, LEAST_NORM_STD = 0.01, 0.08  # of the logarithms
TREND_FROM = 16  # values from which on a forecast has a trend

TAIL = 2.0  # scores beyond this are the tail
NORMAL_TAIL = 0.0455  # share of normal scores beyond it, on both sides
NORMAL_EXCESS = 0.1618  # mean of log(score / TAIL) of the normal scores beyond it
PRIOR_EXCESS, PRIOR_COUNT = (
    0.25,
    10.0,
)  # before there is evidence: as of t with 8 degrees of freedom
MOST_EXCESS = 0.41  # of t with 3 degrees of freedom
TAIL_MEMORY = 200.0  # scores of the tail; older ones count less and less

QUARANTINE = 16  # steps before and after an alarm whose scores the tail does not learn from
SETTLE = 4  # values that make a new level, after a planned change or far below the old one
PATIENCE = 4  # times ``accept_after``: after so many alarms a level is accepted that is none


@dataclass(frozen=True)
class SpikeVerdict:
    """What the detector says of one step.

    Attributes:
        step: The step, as it was given.
        is_spike: Whether this step should not be taken as it is.
        reason: Why, in a few words; empty where there is nothing to say.
        loss: The loss, as it was given.
        grad_norm: The gradient norm, as it was given.
        loss_score: Error of the loss's forecast, in standard deviations; None while it is learned.
        norm_score: The same of the gradient norm.
        loss_threshold: Score beyond which the loss alone is a spike.
        norm_threshold: Score beyond which the gradient norm alone is one.
        loss_expected: The forecast, in units of the loss.
        norm_expected: The forecast, in units of the norm.
        loss_limit: ``loss_threshold`` in units of the loss.
        norm_limit: ``norm_threshold`` in units of the norm.
        accepted: Whether, with this step, a level that stayed has become the new normal.
    """

    step: int
    is_spike: bool
    reason: str
    loss: float
    grad_norm: float | None = None
    loss_score: float | None = None
    norm_score: float | None = None
    loss_threshold: float | None = None
    norm_threshold: float | None = None
    loss_expected: float | None = None
    norm_expected: float | None = None
    loss_limit: float | None = None
    norm_limit: float | None = None
    accepted: bool = False


def median(values: Iterable[float]) -> float:
    """Of at least one value, in half the time that ``statistics.median`` takes."""
    ordered = sorted(values)
    middle = len(ordered) // 2
    if len(ordered) % 2:
        return ordered[middle]
    return 0.5 * (ordered[middle - 1] + ordered[middle])


def forecast(values: Sequence[float]) -> tuple[float, float]:
    """The next value, and how much wider than the noise its error is for having few values.

    The line through the medians of the older and the newer half (Tukey's resistant line,
    Exploratory Data Analysis, 1977, ch. 5, of halves instead of thirds): less than half of either
    may be anything. It is followed downwards only, for what rises is to be noticed. The median of n
    normal values has pi / (2 n) of the variance of one; the line through two has 5 pi / (2 n).
    """
    count = len(values)
    if count < TREND_FROM:
        return median(values), math.sqrt(1 + math.pi / 2 / count)
    half = count // 2
    older, newer = median(values[:half]), median(values[count - half :])
    slope = min(newer - older, 0.0) / (count - half)  # they lie in the middles of the halves
    return newer + slope * (half + 1) / 2, math.sqrt(1 + 5 * math.pi / 2 / count)


def tail_quantile(excess: float, probability: float) -> float:
    """Score that is exceeded with ``probability``, of noise with such a tail.

    Beyond ``TAIL`` scores are taken for Pareto's, whose index ``excess`` estimates (Hill, Annals of
    Statistics 3, 1975) and whose quantiles are TAIL (share / probability)^excess (Weissman, JASA
    73, 1978, Eq. 2). Here as the factor by which a heavier tail than the normal one is further out,
    which is exact for normal scores and within 7 % for Student's t with 4 and more degrees.

    Args:
        excess: Mean of log(score / TAIL) of the scores beyond ``TAIL``.
        probability: Of an exceedance in one step.
    """
    normal = -NormalDist().inv_cdf(probability)
    heavier = min(max(excess, NORMAL_EXCESS), MOST_EXCESS) - NORMAL_EXCESS
    return float(normal * (NORMAL_TAIL / probability) ** heavier)


class _Judged(NamedTuple):
    """One value beside its forecast."""

    value: float
    expected: float
    widening: float  # std of this error, in standard deviations of the noise
    std: float  # of this error
    score: float
    threshold: float  # alone
    together: float  # threshold where the other signal is beyond its own


class _Signal:
    """One series: its forecast, the scale of its errors, and their tail."""

    def __init__(self, window: int, warmup: int, least_std: float) -> None:
        self.warmup = warmup
        self.least_std = least_std
        self.is_log = True
        self.values: deque[float] = deque(maxlen=window)
        self.errors: deque[float] = deque(maxlen=window)  # divided by their widening
        self.excess, self.count = PRIOR_EXCESS, PRIOR_COUNT  # Hill's estimate, and of how many
        self.waiting: list[float] = []  # scores in quarantine
        self.rest = 0  # scores to come that the tail does not learn from
        self.below: list[float] = []  # values far below the forecast, in a row
        self.unjudged = 0  # values to come that only make the level

    def scaled(self, value: float) -> float:
        return math.log(value) if self.is_log else value

    def unscaled(self, value: float) -> float:
        return math.exp(min(value, 700.0)) if self.is_log else value

    def judge(self, value: float, alone: float, together: float) -> _Judged | None:
        """A scaled value, by these probabilities; None while too little is known."""
        if len(self.errors) < self.warmup or self.unjudged > 0 or not self.values:
            return None
        expected, widening = forecast(list(self.values))
        std = self.std(expected) * widening
        thresholds = (tail_quantile(self.excess, each) for each in (alone, together))
        return _Judged(value, expected, widening, std, (value - expected) / std, *thresholds)

    def std(self, expected: float) -> float:
        least = self.least_std * (1.0 if self.is_log else max(abs(expected), 1e-8))
        return max(MAD_TO_STD * median(map(abs, self.errors)), least)

    def learn(self, value: float, judged: _Judged | None) -> None:
        """Take in a scaled value of a step that is no spike."""
        if judged is None:
            if self.values and self.unjudged == 0:
                expected, widening = forecast(list(self.values))
                self.errors.append((value - expected) / widening)
            self.unjudged = max(0, self.unjudged - 1)
        elif self._is_far_below(judged):
            return
        else:
            self.below.clear()
            self.errors.append((value - judged.expected) / judged.widening)
            self._learn_tail(abs(judged.score))
        self.values.append(value)

    def alarm(self, judged: _Judged | None) -> None:
        """A spike, in this signal or in the other: nothing is learned but a fall that stays."""
        self._distrust()
        if judged is not None:
            self._is_far_below(judged)

    def new_level(self, values: Iterable[float] = ()) -> None:
        """Forget the level, but not what is known of the noise."""
        values = list(values)
        self.values.clear()
        self.values.extend(values)
        self.below.clear()
        self.unjudged = max(0, SETTLE - len(values))
        self._distrust()

    def is_level(self, values: Sequence[float]) -> bool:
        """Whether scaled values differ no more than by twice the noise."""
        if not values or not self.errors:
            return True
        middle = median(values)
        spread = MAD_TO_STD * median(abs(value - middle) for value in values)
        return spread < 2 * self.std(middle)

    def leave_log(self) -> None:
        level = math.exp(median(self.values)) if self.values else 1.0
        self.values.extend([math.exp(value) for value in self.values])  # drives out as many
        self.errors.extend([error * level for error in self.errors])
        self.below = [math.exp(value) for value in self.below]
        self.is_log = False

    def _is_far_below(self, judged: _Judged) -> bool:
        """As far as an alarm would be, but below: after a few such values the level is theirs."""
        if judged.score >= -judged.threshold:
            return False
        self.below.append(judged.value)
        if len(self.below) == SETTLE:
            self.new_level(self.below)
        return True

    def _distrust(self) -> None:
        self.waiting.clear()
        self.rest = QUARANTINE

    def _learn_tail(self, score: float) -> None:
        if self.rest > 0:
            self.rest -= 1
            return
        self.waiting.append(score)
        if len(self.waiting) > QUARANTINE and (oldest := self.waiting.pop(0)) > TAIL:
            self.count = min(self.count + 1, TAIL_MEMORY)
            self.excess += (math.log(oldest / TAIL) - self.excess) / self.count

    def state(self) -> dict[str, Any]:
        return {
            "is_log": self.is_log,
            "values": list(self.values),
            "errors": list(self.errors),
            "tail": [self.excess, self.count],
            "waiting": list(self.waiting),
            "rest": self.rest,
            "below": list(self.below),
            "unjudged": self.unjudged,
        }

    def load(self, state: dict[str, Any]) -> None:
        self.is_log = state["is_log"]
        self.values.extend(state["values"])
        self.errors.extend(state["errors"])
        self.excess, self.count = state["tail"]
        self.waiting = list(state["waiting"])
        self.rest = state["rest"]
        self.below = list(state["below"])
        self.unjudged = state["unjudged"]


class SpikeDetector:
    """Tell a spike from noise by the loss and the gradient norm of a step.

    Either signal far beyond its forecast is a spike, and so are both together a little less far.
    Only rises are. NaN and infinity always are. What was flagged stays out of the statistics, until
    it lasts: a level that has stayed for ``accept_after`` alarms in a row is the new normal.

    Logarithms are judged, so that the units do not matter; a loss that can be zero or negative is
    judged as it is, from its first such value on.

    Args:
        window: Values that the forecast and the scale of its errors are read off, in steps.
        warmup: Steps that are learned from before the first verdict.
        false_alarms: False alarms per step that the threshold of either signal aims at.
        accept_after: Alarms in a row after which a level is accepted as the new one.

    Raises:
        ValueError: If the window is below 8, or another argument is out of its range.

    Example:
        >>> detector = SpikeDetector(window=16, warmup=8)
        >>> calm = [detector.update(step, 2.0, 0.5).is_spike for step in range(20)]
        >>> any(calm), detector.update(20, 2.0, 5.0).reason
        (False, 'gradient norm')
    """

    def __init__(
        self,
        window: int = 64,
        warmup: int = 32,
        false_alarms: float = 1e-5,
        accept_after: int = 16,
    ) -> None:
        check_least("SpikeDetector", 8, window=window)
        check_least("SpikeDetector", 4, warmup=warmup)
        check_least("SpikeDetector", 2, accept_after=accept_after)
        if warmup > window:
            rule = f"must be at most window={window}"
            raise argument_error("SpikeDetector", "warmup", warmup, rule)
        if not 0 < false_alarms < 0.1:
            rule = "must be between 0 and 0.1 per step"
            raise argument_error("SpikeDetector", "false_alarms", false_alarms, rule)
        self.window = window
        self.warmup = warmup
        self.false_alarms = false_alarms
        self.accept_after = accept_after
        self._start()

    def _start(self) -> None:
        self._loss = _Signal(self.window, self.warmup, LEAST_LOSS_STD)
        self._norm = _Signal(self.window, self.warmup, LEAST_NORM_STD)
        self._flagged: list[tuple[float, float | None]] = []  # loss and norm of alarms in a row

    def update(self, step: int, loss: float, grad_norm: float | None = None) -> SpikeVerdict:
        """Judge one step, and learn from it unless it is a spike.

        Args:
            step: Its number, for the verdict.
            loss: Its loss, the mean over the window of gradient accumulation.
            grad_norm: Norm of its gradients before clipping; None, or zero, where there is none.

        Raises:
            ValueError: If ``grad_norm`` is negative.
        """
        if grad_norm is not None and grad_norm < 0:
            raise argument_error("SpikeDetector.update", "grad_norm", grad_norm, "must not be < 0")
        if not math.isfinite(loss):
            return SpikeVerdict(step, True, "loss is not finite", loss, grad_norm)
        if grad_norm is not None and not math.isfinite(grad_norm):
            return SpikeVerdict(step, True, "gradient norm is not finite", loss, grad_norm)
        if loss <= 0 and self._loss.is_log:
            self._loss.leave_log()

        # Independent signals: either beyond q, or both beyond sqrt(q / 2), are 2.5 q in all.
        probabilities = self.false_alarms, math.sqrt(self.false_alarms / 2)
        judged_loss = self._loss.judge(self._loss.scaled(loss), *probabilities)
        judged_norm = (
            self._norm.judge(self._norm.scaled(grad_norm), *probabilities) if grad_norm else None
        )
        reason = _reason(judged_loss, judged_norm)
        accepted = False
        if reason:
            self._flagged.append((loss, grad_norm))
            self._loss.alarm(judged_loss)
            self._norm.alarm(judged_norm)
            if accepted := self._has_stayed():
                reason = f"accepted as the new level: {reason}"
                self.accept_level()
        else:
            self._flagged.clear()
            self._loss.learn(self._loss.scaled(loss), judged_loss)
            if grad_norm:
                self._norm.learn(self._norm.scaled(grad_norm), judged_norm)
        return SpikeVerdict(
            step,
            bool(reason) and not accepted,
            reason,
            loss,
            grad_norm,
            accepted=accepted,
            **_fields("loss", self._loss, judged_loss),
            **_fields("norm", self._norm, judged_norm),
        )

    def planned_change(self, reason: str) -> None:
        """From the next step on, learn a new level of both signals instead of raising an alarm.

        What is known of their noise is kept, so that after a few steps they are judged again.

        Args:
            reason: What changes, in a few words; for whoever reads the call.
        """
        del reason
        self._flagged.clear()
        self._loss.new_level()
        self._norm.new_level()

    def accept_level(self) -> None:
        """Take what the last alarms in a row have shown for the new level."""
        losses, norms = self._last_flagged()
        self._flagged.clear()
        self._loss.new_level(losses)
        self._norm.new_level(norms)

    def state_dict(self) -> dict[str, Any]:
        """Numbers, lists and dicts: as JSON and back, the verdicts that follow are the same."""
        return {
            "window": self.window,
            "loss": self._loss.state(),
            "norm": self._norm.state(),
            "flagged": [list(pair) for pair in self._flagged],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from ``state_dict``; with another window start anew, with a warning."""
        self._start()
        if state_dict["window"] != self.window:
            warnings.warn(
                f"SpikeDetector(window={self.window}): the state was saved with a window of "
                f"{state_dict['window']} steps. The statistics start anew.",
                stacklevel=2,
            )
            return
        self._loss.load(state_dict["loss"])
        self._norm.load(state_dict["norm"])
        self._flagged = [(loss, norm) for loss, norm in state_dict["flagged"]]

    def _has_stayed(self) -> bool:
        """Whether the last alarms show a level, or go on for so long that nobody would wait."""
        if len(self._flagged) < self.accept_after:
            return False
        if len(self._flagged) >= PATIENCE * self.accept_after:
            return True
        losses, norms = self._last_flagged()
        return self._loss.is_level(losses) and self._norm.is_level(norms)

    def _last_flagged(self) -> tuple[list[float], list[float]]:
        """Scaled losses and norms."""
        last = self._flagged[-self.accept_after :]
        losses = [self._loss.scaled(loss) for loss, _ in last]
        return losses, [self._norm.scaled(norm) for _, norm in last if norm]


def _reason(loss: _Judged | None, norm: _Judged | None) -> str:
    """Which signals make a spike; empty if none does."""
    names = {"loss": loss, "gradient norm": norm}
    known = {name: judged for name, judged in names.items() if judged is not None}
    high = [name for name, judged in known.items() if judged.score > judged.threshold]
    if not high and len(known) == 2:
        high = [name for name, judged in known.items() if judged.score > judged.together]
        high = high if len(high) == 2 else []
    return " and ".join(high)


def _fields(name: str, signal: _Signal, judged: _Judged | None) -> dict[str, Any]:
    """What a verdict says of a signal."""
    if judged is None:
        return {}
    return {
        f"{name}_score": judged.score,
        f"{name}_threshold": judged.threshold,
        f"{name}_expected": signal.unscaled(judged.expected),
        f"{name}_limit": signal.unscaled(judged.expected + judged.threshold * judged.std),
    }
