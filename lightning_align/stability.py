"""Is this step a spike? A verdict from the loss and the gradient norm, before the step is taken.

Each of the two signals is forecast one step ahead by a robust line through its last values, and
the error of the forecast is measured in robust standard deviations of earlier errors: the score.
How high a score may be is read off the run's own errors: beyond two standard deviations they are
described by a generalized Pareto distribution, whose quantile is the threshold. So neither the
scale of the noise nor the weight of its tails is a setting.

Pure: numbers in, numbers out, plain data as state. Nothing here knows of tensors or a trainer.
"""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning_align._errors import argument_error, check_least

MAD_TO_STD = 1.4826  # 1 / Phi^-1(3/4): of normal noise, the MAD times this is the std
TAIL_START = 2.0  # scores beyond this are the tail; of normal noise 4.6 % are, on both sides
TAIL_MEMORY = 2000.0  # steps; older scores count less and less
# Before there is evidence: what Student's t with 6 degrees of freedom has beyond TAIL_START.
PRIOR_STEPS, PRIOR_SHARE, PRIOR_EXCESS, PRIOR_SQUARE = 200.0, 0.075, 0.75, 1.4
SMALLEST_STD = 0.005  # of a log; half a per cent of noise is taken to be there in a constant
SETTLE = 4  # values after a change that was announced, or a level that was accepted, unjudged


@dataclass(frozen=True)
class SpikeVerdict:
    """What the detector says of one step.

    Attributes:
        step: The step, as it was given.
        is_spike: Whether this step should not be taken as it is.
        reason: Why, in a few words; empty where it is no spike.
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


def median(values: Sequence[float]) -> float:
    """Of at least one value, in half the time that ``statistics.median`` takes."""
    ordered = sorted(values)
    middle = len(ordered) // 2
    if len(ordered) % 2:
        return ordered[middle]
    return 0.5 * (ordered[middle - 1] + ordered[middle])


def forecast(values: Sequence[float]) -> float:
    """The next value, on the line through the medians of the older and the newer half.

    The line of Tukey's resistant fit (Exploratory Data Analysis, 1977, ch. 5), of halves instead of
    thirds: less than half of either half may be anything. Below 8 values there is no trend yet.
    """
    count = len(values)
    if count < 8:
        return median(values)
    half = count // 2
    older, newer = median(values[:half]), median(values[count - half :])
    slope = (newer - older) / (count - half)  # medians lie in the middles of the halves
    return newer + slope * (half + 1) / 2


def pareto_quantile(share: float, mean: float, square: float, probability: float) -> float:
    """Score that is exceeded with ``probability``, of scores with a generalized Pareto tail.

    Peaks over a threshold: Siffer et al., KDD 2017 (SPOT), Eq. 1, with shape and scale by moments
    (Hosking & Wallis 1987, Technometrics 29, Eq. 7).

    Args:
        share: Share of scores beyond ``TAIL_START``, on one side.
        mean: Mean of what they have beyond it.
        square: Mean of the squares of that.
        probability: Of an exceedance in one step.
    """
    ratio = mean**2 / max(square - mean**2, 1e-12)
    shape = min(max(0.5 * (1 - ratio), -0.2), 0.45)
    scale = mean * (1 - shape)  # the mean of the Pareto distribution is scale / (1 - shape)
    odds = max(share / probability, 1.0)
    if abs(shape) < 1e-6:
        return TAIL_START + scale * math.log(odds)
    return TAIL_START + scale / shape * (odds**shape - 1)


class _Signal:
    """One series: its forecast, the scale of its errors, and their tail."""

    def __init__(self, window: int, warmup: int) -> None:
        self.warmup = warmup
        self.values: deque[float] = deque(maxlen=window)
        self.errors: deque[float] = deque(maxlen=window)
        self.unjudged = 0
        self.tail = [PRIOR_SHARE, PRIOR_EXCESS, PRIOR_SQUARE, PRIOR_STEPS]

    def judge(self, value: float) -> tuple[float, float, float] | None:
        """Forecast, standard deviation and score; None while too little is known."""
        if len(self.errors) < self.warmup or self.unjudged > 0 or not self.values:
            return None
        expected, std = forecast(list(self.values)), self.std()
        return expected, std, (value - expected) / std

    def std(self) -> float:
        return max(MAD_TO_STD * median([abs(error) for error in self.errors]), SMALLEST_STD)

    def threshold(self, probability: float) -> float:
        share, mean, square, _ = self.tail
        return pareto_quantile(share / 2, mean, square, probability)

    def learn(self, value: float) -> None:
        """Take a value in that is no spike."""
        if self.values and self.unjudged == 0:
            error = value - forecast(list(self.values))
            if len(self.errors) >= self.warmup:
                self._learn_tail(abs(error) / self.std())
            self.errors.append(error)
        self.unjudged = max(0, self.unjudged - 1)
        self.values.append(value)

    def _learn_tail(self, score: float) -> None:
        share, mean, square, steps = self.tail
        beyond = score > TAIL_START
        if beyond:
            weight = 1 / (share * steps + 1)  # of one exceedance among those that count
            excess = score - TAIL_START
            mean += weight * (excess - mean)
            square += weight * (excess**2 - square)
        share += (beyond - share) / (steps + 1)
        self.tail = [share, mean, square, min(steps + 1, TAIL_MEMORY)]

    def new_level(self, values: Sequence[float] = ()) -> None:
        """Forget the level, and keep what is known of the noise."""
        self.values.clear()
        self.values.extend(values)
        self.unjudged = max(0, SETTLE - len(values))

    def state(self) -> dict[str, Any]:
        return {
            "values": list(self.values),
            "errors": list(self.errors),
            "unjudged": self.unjudged,
            "tail": list(self.tail),
        }

    def load(self, state: dict[str, Any]) -> None:
        self.values.clear()
        self.values.extend(state["values"])
        self.errors.clear()
        self.errors.extend(state["errors"])
        self.unjudged = state["unjudged"]
        self.tail = list(state["tail"])


class SpikeDetector:
    """Tell a spike from noise by the loss and the gradient norm of a step.

    Either signal alone, far beyond its forecast, is a spike; so are both together a little less
    far. NaN and infinity always are. What was flagged stays out of the statistics, unless it
    lasts: after ``accept_after`` alarms in a row the level counts as the new normal.

    Args:
        window: Values that the forecast and the scale of its errors are read off, in steps.
        warmup: Steps that are learned from before the first verdict.
        false_alarms: False alarms per step that the thresholds aim at, for either signal.
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
            raise argument_error(
                "SpikeDetector", "warmup", warmup, f"must be at most window={window}"
            )
        if not 0 < false_alarms < 0.1:
            rule = "must be between 0 and 0.1 per step"
            raise argument_error("SpikeDetector", "false_alarms", false_alarms, rule)
        self.window = window
        self.warmup = warmup
        self.false_alarms = false_alarms
        self.accept_after = accept_after
        self._start()

    def _start(self) -> None:
        self._loss = _Signal(self.window, self.warmup)
        self._norm = _Signal(self.window, self.warmup)
        self._log_loss = True
        self._pending: list[tuple[float, float | None]] = []

    def update(self, step: int, loss: float, grad_norm: float | None = None) -> SpikeVerdict:
        """Judge one step, and learn from it unless it is a spike.

        Args:
            step: Its number, for the verdict.
            loss: Its loss, the mean over the window of gradient accumulation.
            grad_norm: Norm of its gradients before clipping; None where it is not known.

        Raises:
            ValueError: If ``grad_norm`` is negative.
        """
        if grad_norm is not None and grad_norm < 0:
            raise argument_error("SpikeDetector.update", "grad_norm", grad_norm, "must not be < 0")
        if not math.isfinite(loss):
            return SpikeVerdict(step, True, "loss is not finite", loss, grad_norm)
        if grad_norm is not None and not math.isfinite(grad_norm):
            return SpikeVerdict(step, True, "gradient norm is not finite", loss, grad_norm)
        if self._log_loss and loss <= 0:
            self._leave_log()
        verdict = self._judge(step, loss, grad_norm)
        if not verdict.is_spike:
            self._pending.clear()
            self._learn(loss, grad_norm)
            return verdict
        self._pending.append((loss, grad_norm))
        if len(self._pending) < self.accept_after:
            return verdict
        self.accept_level()
        fields = {**vars(verdict), "is_spike": False, "accepted": True}
        return SpikeVerdict(**fields)

    def planned_change(self, reason: str) -> None:
        """From the next step on, learn a new level instead of raising an alarm.

        What is known of the noise is kept, so that it takes ``SETTLE`` steps only.

        Args:
            reason: What changes, in a few words. Not judged by.
        """
        del reason
        self._pending.clear()
        self._loss.new_level()
        self._norm.new_level()

    def accept_level(self) -> None:
        """Take what the last alarms in a row have shown for the new level."""
        losses = [self._loss_value(loss) for loss, _ in self._pending]
        norms = [math.log(norm) for _, norm in self._pending if norm]
        self._pending.clear()
        self._loss.new_level(losses)
        self._norm.new_level(norms)

    def state_dict(self) -> dict[str, Any]:
        """Numbers, lists and dicts: as JSON and back, the verdicts that follow are the same."""
        return {
            "window": self.window,
            "log_loss": self._log_loss,
            "loss": self._loss.state(),
            "norm": self._norm.state(),
            "pending": [list(pair) for pair in self._pending],
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
        self._log_loss = state_dict["log_loss"]
        self._loss.load(state_dict["loss"])
        self._norm.load(state_dict["norm"])
        self._pending = [(loss, norm) for loss, norm in state_dict["pending"]]

    def _judge(self, step: int, loss: float, grad_norm: float | None) -> SpikeVerdict:
        fields: dict[str, Any] = {}
        alone, both = [], []
        series: list[tuple[str, _Signal, float | None]] = [
            ("loss", self._loss, self._loss_value(loss)),
            ("norm", self._norm, math.log(grad_norm) if grad_norm else None),
        ]
        for name, signal, value in series:
            judged = None if value is None else signal.judge(value)
            if judged is None:
                continue
            expected, std, score = judged
            threshold = signal.threshold(self.false_alarms)
            back = math.exp if name == "norm" or self._log_loss else float
            fields[f"{name}_score"] = score
            fields[f"{name}_threshold"] = threshold
            fields[f"{name}_expected"] = back(expected)
            fields[f"{name}_limit"] = back(expected + threshold * std)
            alone.append(score > threshold)
            both.append(score > signal.threshold(math.sqrt(self.false_alarms)))
        names = [name.split("_")[0] for name in fields if name.endswith("_score")]
        high = [name for name, is_high in zip(names, alone, strict=True) if is_high]
        if not high and len(both) == 2 and all(both):
            high = names
        reason = " and ".join({"loss": "loss", "norm": "gradient norm"}[name] for name in high)
        return SpikeVerdict(step, bool(high), reason, loss, grad_norm, **fields)

    def _loss_value(self, loss: float) -> float:
        return math.log(loss) if self._log_loss else loss

    def _learn(self, loss: float, grad_norm: float | None) -> None:
        self._loss.learn(self._loss_value(loss))
        if grad_norm:
            self._norm.learn(math.log(grad_norm))

    def _leave_log(self) -> None:
        """A loss that can be negative is judged as it is, from its first such value on."""
        self._log_loss = False
        values = [math.exp(value) for value in self._loss.values]
        level = median(values) if values else 1.0
        errors = [error * level for error in self._loss.errors]
        self._loss.values = deque(values, maxlen=self.window)
        self._loss.errors = deque(errors, maxlen=self.window)
