"""Curves of loss and gradient norm with known spikes, drawn from a seed. Frozen: see ``curves.py``.

Each curve falls steeply, then slowly, has two or three changes that are no spikes, noise of one
of three families, and eight events. All effects are factors, so that they add in the logarithm.

    changes  lr drop (a fall of 3 to 15 % in a few tens of steps), plateau, level shift: at once
             downwards, or upwards by 5 to 25 % within 100 to 300 steps
    noise    std of the log loss 0.5 to 8 %, of the log norm 1.5 to 2.5 times as much, correlated by
             0 to 0.5: Gaussian AR(1); Student t with 4 degrees of freedom, scaled to that std;
             Gaussian with a scale that drifts by up to 7 times within hundreds of steps
    events   jump: one step, loss 1.5 to 4 times, norm 1.5 to 8 times
             ramp: rises to the same within 5 to 20 steps, then decays
             bump: one to three steps, loss 1.05 to 1.5 times, norm 3 to 10 times

A level that rises at once and stays is at its first step the same as a spike: it is neither a clean
step nor an event, and ``curves.py`` looks at it apart.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

FAMILIES = ("gaussian", "student_t", "drifting")
STEPS = 2000
EVENTS = 8
FIRST_EVENT, LAST_EVENT, APART = 150, 1900, 120  # steps
SCALES = 0.005, 0.08


@dataclass(frozen=True)
class Event:
    """A spike: an alarm in [start, stop) finds it; from ``clean`` on all is as before."""

    kind: str
    start: int
    stop: int
    clean: int


@dataclass(frozen=True)
class Curve:
    """One run of ``STEPS`` steps, and where its events are."""

    family: str
    loss: Array  # (STEPS,)
    norm: Array  # (STEPS,)
    events: list[Event]

    def is_clean(self) -> npt.NDArray[np.bool_]:
        clean = np.ones(STEPS, bool)
        for event in self.events:
            clean[event.start : event.clean] = False
        return clean


def log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def levels(rng: np.random.Generator) -> tuple[Array, Array]:
    """Logarithms of loss and norm, without noise and events."""
    step = np.arange(STEPS, dtype=float)
    pace = np.ones(STEPS)  # of the slow decay
    extra_loss, extra_norm = np.zeros(STEPS), np.zeros(STEPS)
    for _ in range(rng.integers(2, 4)):
        at, kind = rng.integers(300, 1800), rng.choice(["lr drop", "plateau", "down", "up"])
        since = np.maximum(step - at, 0)
        if kind == "plateau":
            pace[at : at + 300] = 0
            continue
        if kind == "lr drop":
            shape = 1 - np.exp(-since / rng.uniform(10, 60))
            loss, norm = np.log(1 - rng.uniform(0.03, 0.15)), np.log(rng.uniform(0.7, 1.5))
        elif kind == "down":
            shape = (since > 0).astype(float)
            loss, norm = np.log(rng.uniform(0.6, 0.95)), np.log(rng.uniform(0.7, 1))
        else:
            shape = np.minimum(since / rng.uniform(100, 300), 1)
            loss, norm = np.log(rng.uniform(1.05, 1.25)), np.log(rng.uniform(0.8, 1.25))
        extra_loss += loss * shape
        extra_norm += norm * shape
    start, end = rng.uniform(6, 11), rng.uniform(1.5, 4)
    fall = np.log(end + (start - end) * np.exp(-step / rng.uniform(20, 80)))
    slow = -rng.uniform(0, 0.15) * np.log1p(np.cumsum(pace) / 500)
    first, last = rng.uniform(1, 5), rng.uniform(0.2, 1)
    norm_fall = np.log(last + (first - last) * np.exp(-step / rng.uniform(20, 100)))
    wave = rng.uniform(0, 0.3) * np.sin(2 * np.pi * (step / rng.uniform(800, 3000) + rng.random()))
    return fall + slow + extra_loss, norm_fall + wave + extra_norm


def unit_noise(rng: np.random.Generator, family: str, phi: float) -> Array:
    """Of variance 1, (STEPS,)."""
    if family == "student_t":
        return rng.standard_t(4, STEPS) / np.sqrt(2)  # the variance of t is df / (df - 2)
    draws = rng.standard_normal(STEPS)
    if family == "gaussian":
        for step in range(1, STEPS):
            draws[step] = phi * draws[step - 1] + np.sqrt(1 - phi**2) * draws[step]
    return draws


def noise(rng: np.random.Generator, family: str) -> tuple[Array, Array]:
    """Of the logarithms of loss and norm."""
    scale: float | Array = log_uniform(rng, *SCALES)
    phi, correlation = rng.uniform(0, 0.9), rng.uniform(0, 0.5)
    loss, own = unit_noise(rng, family, phi), unit_noise(rng, family, phi)
    norm = correlation * loss + np.sqrt(1 - correlation**2) * own
    if family == "drifting":
        wave = np.sin(2 * np.pi * (np.arange(STEPS) / rng.uniform(300, 1000) + rng.random()))
        scale = np.clip(scale * np.exp(rng.uniform(0.5, 1) * wave), *SCALES)
    return scale * loss, rng.uniform(1.5, 2.5) * scale * norm


def add_event(rng: np.random.Generator, kind: str, at: int, loss: Array, norm: Array) -> Event:
    """Into the logarithms, in place."""
    if kind == "bump":
        stop = at + int(rng.integers(1, 4))
        loss[at:stop] += np.log(rng.uniform(1.05, 1.5))
        norm[at:stop] += np.log(log_uniform(rng, 3, 10))
        return Event(kind, at, stop, stop)
    rise = 1 if kind == "jump" else int(rng.integers(5, 21))
    loss_factor, norm_factor = log_uniform(rng, 1.5, 4), log_uniform(rng, 1.5, 8)
    shape = np.arange(1, rise + 1) / rise
    if kind == "ramp":
        decay = rng.uniform(3, 15)
        shape = np.append(shape, np.exp(-np.arange(1, int(5 * decay)) / decay))
    clean = at + len(shape)
    loss[at:clean] += np.log(loss_factor) * shape
    norm[at:clean] += np.log(norm_factor) * shape
    return Event(kind, at, at + rise, clean)


def draw(family: str, seed: int) -> Curve:
    """The curve of a seed, the same wherever NumPy draws the same."""
    rng = np.random.default_rng([FAMILIES.index(family), seed])
    loss, norm = levels(rng)
    loss_noise, norm_noise = noise(rng, family)
    loss += loss_noise
    norm += norm_noise
    slack = LAST_EVENT - FIRST_EVENT - (EVENTS - 1) * APART
    starts = FIRST_EVENT + np.sort(rng.integers(0, slack, EVENTS)) + APART * np.arange(EVENTS)
    kinds = rng.choice(["jump", "ramp", "bump"], EVENTS)
    events = [
        add_event(rng, kind, int(at), loss, norm)
        for kind, at in zip(kinds.tolist(), starts, strict=True)
    ]
    return Curve(family, np.exp(loss), np.exp(norm), events)
