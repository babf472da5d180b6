"""Is this step a spike? A verdict from the loss and the gradient norm, before the step is taken.

Each of the two signals is forecast one step ahead from the medians of its last values, and the
error of the forecast is measured in robust standard deviations of earlier errors: the score. How
high a score may be is read off the run's own scores, from how far those go that go far; so is how
high two may be at a time: those of both signals, or of one of them at two steps in a row. So
neither the scale of the noise, nor the weight of its tails, nor how much the two signals, or one
step and the next, have in common is a setting.

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

from lightning_align._declared import declared
from lightning_align._errors import argument_error, check_least

MAD_TO_STD = 1.4826  # 1 / Phi^-1(3/4): of normal noise, the MAD times this is the std
# Noise that is taken to be there in any run: a rise within it is no harm, however calm the run.
LEAST_LOSS_STD, LEAST_NORM_STD = 0.01, 0.08  # of the logarithms
TREND_FROM = 16  # values from which on a forecast has a trend
QUARANTINE = 16  # steps before and after an alarm whose scores the tail does not learn from
TAIL_MEMORY, SHARE_MEMORY = 200.0, 2000.0  # scores of the tail, and steps; older ones count less
SETTLE = 4  # values that make a new level, after a planned change or far below the old one
PAST = 16  # scores that two in a row must stand out from
LASTING = 8.0  # times as many false alarms may two in a row cost: what lasts does more harm
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
    Exploratory Data Analysis, 1977, of halves instead of thirds): less than half of either may be
    anything. It is followed downwards only, for what rises is to be noticed. The median of n
    normal values has pi / (2 n) of the variance of one; the line through two has 5 pi / (2 n).
    """
    count = len(values)
    if count < TREND_FROM:
        return median(values), math.sqrt(1 + math.pi / 2 / count)
    half = count // 2
    older, newer = median(values[:half]), median(values[count - half :])
    slope = min(newer - older, 0.0) / (count - half)  # they lie in the middles of the halves
    return newer + slope * (half + 1) / 2, math.sqrt(1 + 5 * math.pi / 2 / count)


class Tail(NamedTuple):
    """The scores of some noise beyond where its tail begins.

    Attributes:
        start: Where it begins.
        share: Of all scores, those beyond it.
        excess: Mean of log(score / start) of those.
        scores: How many the mean is of; infinity where it is known.
    """

    start: float
    share: float
    excess: float
    scores: float = math.inf


# Normal noise, and what is taken for the run's own until it has shown it: about that of Student's t
# with 8 degrees of freedom. Of one signal, on both sides:
NORMAL, PRIOR = Tail(2.0, 0.0455, 0.1618), Tail(2.0, 0.0455, 0.25)
# Of the lower of two independent signals, above only:
NORMAL_LOWER, PRIOR_LOWER = Tail(1.5, 0.00446, 0.1383), Tail(1.5, 0.0065, 0.2)
PRIOR_COUNT = 20.0  # scores beyond the start that a prior weighs as much as
MOST_EXCESS = 0.25  # more than the normal one: Student's t with 3 degrees has this


def times_further(tail: Tail, normal: Tail, probability: float) -> float:
    """How many times further out a tail's quantile is than the normal one's.

    Beyond its start a tail is taken for Pareto's: its index is ``excess`` (Hill, Annals of
    Statistics 3, 1975), its quantiles are start (share / probability)^excess (Weissman, Journal of
    the American Statistical Association 73, 1978). This is the ratio of two of them, so that normal
    noise has its exact quantile.

    Of a few scores the index is not known well, and the quantile is the one of the next score
    instead: logarithms of a Pareto tail are exponential, and the next exponential value after
    ``scores`` of them has Lomax's distribution, P(x > t) = (1 + t / (scores excess))^-scores.

    Args:
        tail: The run's own.
        normal: That of normal noise, with the same start.
        probability: Of an exceedance in one step.
    """
    index = min(max(tail.excess, normal.excess), normal.excess + MOST_EXCESS)
    odds, normal_odds = math.log(tail.share / probability), math.log(normal.share / probability)
    if math.isfinite(tail.scores):
        odds = tail.scores * math.expm1(odds / tail.scores)
    return max(1.0, math.exp(index * odds - normal.excess * normal_odds))


def normal_quantile(probability: float) -> float:
    """Score that normal noise exceeds with ``probability``."""
    return -NormalDist().inv_cdf(probability)


class _RunningTail:
    """What a run's own scores have shown of their tail."""

    def __init__(self, prior: Tail) -> None:
        self.start = prior.start
        self.share, self.steps = prior.share, PRIOR_COUNT / prior.share
        self.excess, self.count = prior.excess, PRIOR_COUNT
        self.waiting: list[float] = []  # scores in quarantine
        self.rest = 0  # scores to come that nothing is learned from

    def seen(self) -> Tail:
        return Tail(self.start, self.share, self.excess, self.count)

    def learn(self, score: float) -> None:
        if self.rest > 0:
            self.rest -= 1
            return
        self.waiting.append(score)
        if len(self.waiting) <= QUARANTINE:
            return
        oldest = self.waiting.pop(0)
        is_beyond = oldest > self.start
        self.steps = min(self.steps + 1, SHARE_MEMORY)
        self.share += (is_beyond - self.share) / self.steps
        if is_beyond:
            self.count = min(self.count + 1, TAIL_MEMORY)
            self.excess += (math.log(oldest / self.start) - self.excess) / self.count

    def distrust(self) -> None:
        """An alarm: what was before it, and what comes after it, may be part of a spike."""
        self.waiting.clear()
        self.rest = QUARANTINE

    def state(self) -> dict[str, Any]:
        return {**vars(self), "waiting": list(self.waiting)}

    def load(self, state: dict[str, Any]) -> None:
        vars(self).update({**state, "waiting": list(state["waiting"])})


def lower_threshold(tail: _RunningTail, probability: float) -> float:
    """What the lower of two scores exceeds with ``probability``.

    Were they independent, normal ones would by the square root of it. In training they are not: how
    often both are high at a time is learned like the tail of one signal.
    """
    normal = normal_quantile(math.sqrt(probability))
    return normal * times_further(tail.seen(), NORMAL_LOWER, probability)


class _Judged(NamedTuple):
    """One value beside its forecast."""

    value: float
    expected: float
    widening: float  # std of this error, in standard deviations of the noise
    std: float  # of this error
    score: float
    threshold: float
    lasting: float  # the lower score of this step and the last, over those before
    lasting_threshold: float


class _Signal:
    """One series: its forecast, the scale of its errors, and their tail."""

    def __init__(self, window: int, warmup: int, least_std: float) -> None:
        self.warmup = warmup
        self.least_std = least_std
        self.is_log = True
        self.values: deque[float] = deque(maxlen=window)
        self.errors: deque[float] = deque(maxlen=window)  # divided by their widening
        self.tail = _RunningTail(PRIOR)
        self.lasting_tail = _RunningTail(PRIOR_LOWER)
        self.scores: deque[float] = deque(maxlen=PAST + 1)  # of alarms as well
        self.below: list[float] = []  # values far below the forecast, in a row
        self.unjudged = 0  # values to come that only make the level

    def scaled(self, value: float) -> float:
        return math.log(value) if self.is_log else value

    def unscaled(self, value: float) -> float:
        return math.exp(min(value, 700.0)) if self.is_log else value

    def judge(self, value: float, probability: float) -> _Judged | None:
        """A scaled value; None while too little is known."""
        if len(self.errors) < self.warmup or self.unjudged > 0 or not self.values:
            return None
        expected, widening = forecast(list(self.values))
        std = self.std(expected) * widening
        # With its share, too, the quantile of Student's t with 4 degrees is a fifth too far out.
        tail = self.tail.seen()._replace(share=NORMAL.share)
        threshold = normal_quantile(probability) * times_further(tail, NORMAL, probability)
        score = (value - expected) / std
        return _Judged(
            value,
            expected,
            widening,
            std,
            score,
            threshold,
            self._lasting(score),
            lower_threshold(self.lasting_tail, LASTING * probability),
        )

    def _lasting(self, score: float) -> float:
        """How high this score and the last both are, over a level that had risen before.

        Slow rises, of which the forecast lags behind, and drifts are none that begin.
        """
        if not self.scores:
            return 0.0
        *before, last = self.scores
        return min(score, last) - (max(0.0, median(before)) if before else 0.0)

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
            self.scores.append(judged.score)
            self.errors.append((value - judged.expected) / judged.widening)
            self.tail.learn(abs(judged.score))
            self.lasting_tail.learn(judged.lasting)
        self.values.append(value)

    def alarm(self, judged: _Judged | None) -> None:
        """A spike, in this signal or in the other: nothing is learned but a fall that stays."""
        self._distrust()
        if judged is not None and not self._is_far_below(judged):
            self.scores.append(judged.score)

    def new_level(self, values: Iterable[float] = ()) -> None:
        """Forget the level, but not what is known of the noise."""
        values = list(values)
        self.values.clear()
        self.values.extend(values)
        self.below.clear()
        self.scores.clear()
        self.unjudged = max(0, SETTLE - len(values))

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
        """As far as two in a row would raise an alarm, but below: a few make a new level."""
        if judged.score >= -min(judged.threshold, judged.lasting_threshold):
            return False
        self.scores.append(judged.score)
        self.below.append(judged.value)
        if len(self.below) == SETTLE:
            self.new_level(self.below)
            self._distrust()
        return True

    def _distrust(self) -> None:
        self.tail.distrust()
        self.lasting_tail.distrust()

    def state(self) -> dict[str, Any]:
        return {
            "is_log": self.is_log,
            "values": list(self.values),
            "errors": list(self.errors),
            "tail": self.tail.state(),
            "lasting_tail": self.lasting_tail.state(),
            "scores": list(self.scores),
            "below": list(self.below),
            "unjudged": self.unjudged,
        }

    def load(self, state: dict[str, Any]) -> None:
        self.is_log = state["is_log"]
        self.values.extend(state["values"])
        self.errors.extend(state["errors"])
        self.tail.load(state["tail"])
        self.lasting_tail.load(state["lasting_tail"])
        self.scores.extend(state["scores"])
        self.below = list(state["below"])
        self.unjudged = state["unjudged"]


@declared
class SpikeDetector:
    """Tell a spike from noise by the loss and the gradient norm of a step.

    Either signal far beyond its forecast is a spike, and so are both together a little less far, or
    one of them at two steps in a row. Only rises are. NaN and infinity always are. What was flagged
    stays out of the statistics, until it lasts: a level that has stayed for ``accept_after`` alarms
    in a row is the new normal.

    Logarithms are judged, so that the units do not matter; a loss that can be zero or negative is
    judged as it is, from its first such value on.

    Args:
        window: Values that the forecast and the scale of its errors are read off, in steps.
        warmup: Steps that are learned from before the first verdict; None takes the window.
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
        warmup: int | None = None,
        false_alarms: float = 5e-6,
        accept_after: int = 16,
    ) -> None:
        check_least("SpikeDetector", 8, window=window)
        warmup = window if warmup is None else warmup
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
        self._lower = _RunningTail(PRIOR_LOWER)
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

        judged_loss = self._loss.judge(self._loss.scaled(loss), self.false_alarms)
        judged_norm = (
            self._norm.judge(self._norm.scaled(grad_norm), self.false_alarms) if grad_norm else None
        )
        reason = self._reason(judged_loss, judged_norm)
        accepted = False
        if reason:
            self._flagged.append((loss, grad_norm))
            self._loss.alarm(judged_loss)
            self._norm.alarm(judged_norm)
            self._lower.distrust()
            if accepted := self._has_stayed():
                reason = f"accepted as the new level: {reason}"
                self.accept_level()
        else:
            self._flagged.clear()
            self._loss.learn(self._loss.scaled(loss), judged_loss)
            if grad_norm:
                self._norm.learn(self._norm.scaled(grad_norm), judged_norm)
            if judged_loss and judged_norm:
                self._lower.learn(min(judged_loss.score, judged_norm.score))
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
            "lower": self._lower.state(),
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
        self._lower.load(state_dict["lower"])
        self._flagged = [(loss, norm) for loss, norm in state_dict["flagged"]]

    def _reason(self, loss: _Judged | None, norm: _Judged | None) -> str:
        """Which signals make a spike; empty if none does."""
        high = []
        if loss and loss.score > loss.threshold:
            high.append("loss")
        if norm and norm.score > norm.threshold:
            high.append("gradient norm")
        both = lower_threshold(self._lower, self.false_alarms)
        if loss and norm and not high and min(loss.score, norm.score) > both:
            high = ["loss", "gradient norm"]
        if high:
            return " and ".join(high)
        if loss and loss.lasting > loss.lasting_threshold:
            high.append("loss")
        if norm and norm.lasting > norm.lasting_threshold:
            high.append("gradient norm")
        return f"{' and '.join(high)}, two steps in a row" if high else ""

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
