"""Time to train where devices fail: how often to save, and what failures take (Young, Daly).

Failures come at a constant rate, whatever failed before: as many devices as there are, so much more
often one of them, and all have to go back to the last checkpoint. A run works for an interval and
saves, again and again; after a failure it takes a while until it goes on, and may fail meanwhile.

    work | save | work | sa x restart | work | save | ...
                 <---- lost ---->

Young 1974 (doi:10.1145/361147.361115) and Daly 2006 (doi:10.1016/j.future.2004.11.016).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightning_align._declared import declared
from lightning_align._errors import argument_error, check_least
from lightning_align.planner.quantities import SECONDS, quantity, shown_time

# Mean times between failures that a run must get through at a go: e^40 tries are more than enough.
LONGEST = 40.0


@dataclass(frozen=True)
class TimeToTrain:
    """Expected seconds of a run. Made by ``time_to_train``.

    Attributes:
        work_s: That it would take if nothing failed and nothing was saved.
        checkpoints_s: For checkpoints that were finished.
        lost_s: Of work and checkpoints that a failure undid.
        restarts_s: From failures until the run goes on.
        failures: How many.
        interval_s: Of work between two checkpoints.
    """

    work_s: float
    checkpoints_s: float
    lost_s: float
    restarts_s: float
    failures: float
    interval_s: float

    @property
    def seconds(self) -> float:
        """In all."""
        return self.work_s + self.checkpoints_s + self.lost_s + self.restarts_s

    @property
    def goodput(self) -> float:
        """Share of the time that is work and stays."""
        return self.work_s / self.seconds


def young_interval(checkpoint_s: float, mtbf_s: float) -> float:
    """Seconds of work between checkpoints that cost least, to first order (Young 1974).

    Args:
        checkpoint_s: Seconds that a checkpoint stops the run.
        mtbf_s: Mean seconds between two failures of the whole run.

    Raises:
        ValueError: If one is not positive and finite.

    Example:
        >>> round(young_interval(120, 365 * 86400 / 64) / 3600)  # 64 machines that last a year
        3
    """
    _check("young_interval", checkpoint_s=checkpoint_s, mtbf_s=mtbf_s)
    return math.sqrt(2 * checkpoint_s * mtbf_s)


def daly_interval(checkpoint_s: float, mtbf_s: float) -> float:
    """Seconds of work between checkpoints that cost least, to higher order (Daly 2006).

    Args:
        checkpoint_s: Seconds that a checkpoint stops the run.
        mtbf_s: Mean seconds between two failures of the whole run.

    Raises:
        ValueError: If one is not positive and finite.

    Example:
        >>> round(daly_interval(5 * 60, 6 * 3600) / 60)  # of the paper's figure 4
        57
    """
    _check("daly_interval", checkpoint_s=checkpoint_s, mtbf_s=mtbf_s)
    if checkpoint_s >= 2 * mtbf_s:
        return mtbf_s
    share = checkpoint_s / (2 * mtbf_s)
    series = 1 + math.sqrt(share) / 3 + share / 9
    return math.sqrt(2 * checkpoint_s * mtbf_s) * series - checkpoint_s


def time_to_train(
    work_s: float,
    *,
    mtbf_s: float,
    checkpoint_s: float,
    restart_s: float,
    interval_s: float | None = None,
) -> TimeToTrain:
    """Expected time of a run that saves and fails.

    Exact for failures at a constant rate 1 / M: an interval of work and its checkpoint, L seconds,
    take M e^(R / M) (e^(L / M) - 1), with R for each restart (Daly 2006, whose complete model this
    is, but for the last interval, which is as long as work is left). After the last one is saved,
    too.

    Args:
        work_s: Seconds of the run if nothing failed and nothing was saved.
        mtbf_s: Mean seconds between two failures of the whole run.
        checkpoint_s: Seconds that a checkpoint stops the run.
        restart_s: Seconds from a failure until the run goes on.
        interval_s: Seconds of work between checkpoints; None takes ``daly_interval``.

    Raises:
        ValueError: If a time is not positive and finite (a restart may take none), or the run would
            never end.
    """
    where = "time_to_train"
    _check(where, work_s=work_s, mtbf_s=mtbf_s, checkpoint_s=checkpoint_s)
    quantity(where, "restart_s", restart_s, SECONDS, zero=True)
    interval = daly_interval(checkpoint_s, mtbf_s) if interval_s is None else interval_s
    _check(where, interval_s=interval)
    interval = min(interval, work_s)
    unbroken = interval + checkpoint_s + restart_s
    if unbroken > LONGEST * mtbf_s:
        often = f"one comes every {shown_time(mtbf_s)}"
        rule = f"{shown_time(unbroken)} without a failure hardly ever pass if {often}"
        raise argument_error(where, "interval_s", interval, rule, "Save more often, or faster")
    whole = math.floor(work_s / interval * (1 + 1e-12))
    rest = work_s - whole * interval
    lengths = [(whole, interval)] + [(1, rest)] * (rest > 1e-9 * interval)
    again = mtbf_s * math.exp(restart_s / mtbf_s)
    seconds = sum(n * again * math.expm1((w + checkpoint_s) / mtbf_s) for n, w in lengths)
    restarts = -seconds * math.expm1(-restart_s / mtbf_s)  # of which a failure may be the end
    checkpoints = checkpoint_s * sum(n for n, _ in lengths)
    return TimeToTrain(
        work_s=work_s,
        checkpoints_s=checkpoints,
        lost_s=max(0.0, seconds - work_s - checkpoints - restarts),
        restarts_s=restarts,
        failures=seconds / mtbf_s,
        interval_s=interval,
    )


@declared
@dataclass(frozen=True)
class Reliability:
    """How often devices fail, and what saving and starting again take; texts have units.

    Args:
        mtbf: Mean time between failures of one device, with what else fails with it: ``"5y"``.
        checkpoint_time: That a checkpoint stops training: ``"1min"``.
        restart_time: From a failure until training goes on: ``"10min"``.
        checkpoint_interval: Between checkpoints; None takes the best (Daly 2006).

    Raises:
        ValueError: If one is no time.

    Note: a checkpoint that is written beside training stops it for a copy alone. Until it is whole,
    a failure goes back to the one before: add the time of writing to ``restart_time``.

    Example:
        >>> run = Reliability("5.8y").time_to_train(54 * 86400, devices=16384)
        >>> round(run.failures / (run.seconds / 86400))  # a day
        8
    """

    mtbf: float | str
    checkpoint_time: float | str = "1min"
    restart_time: float | str = "10min"
    checkpoint_interval: float | str | None = None

    def __post_init__(self) -> None:
        for argument in ("mtbf", "checkpoint_time", "restart_time", "checkpoint_interval"):
            given = getattr(self, argument)
            if given is not None:
                quantity("Reliability", argument, given, SECONDS, zero=argument == "restart_time")

    def time_to_train(self, work_s: float, *, devices: int) -> TimeToTrain:
        """Expected time of a run on some devices.

        Args:
            work_s: Seconds of the run if nothing failed and nothing was saved.
            devices: How many there are; each failure stops all of them.

        Raises:
            ValueError: As ``time_to_train``.
        """
        check_least("Reliability.time_to_train", 1, devices=devices)
        interval = self.checkpoint_interval
        return time_to_train(
            work_s,
            mtbf_s=_seconds(self.mtbf) / devices,
            checkpoint_s=_seconds(self.checkpoint_time),
            restart_s=_seconds(self.restart_time),
            interval_s=None if interval is None else _seconds(interval),
        )


def _seconds(given: float | str) -> float:
    return quantity("Reliability", "time", given, SECONDS, zero=True)


def _check(where: str, **seconds: float) -> None:
    for argument, value in seconds.items():
        quantity(where, argument, value, SECONDS)
