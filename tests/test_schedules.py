"""The learning-rate curves: against transformers' and torch's at equal token counts, and their
ends."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_cosine_with_min_lr_schedule_with_warmup,
    get_linear_schedule_with_warmup,
    get_wsd_schedule,
)

from lightning_align.schedules import DECAYS, SCHEDULES, lr_fraction

STEPS, TOKENS_PER_STEP, WARMUP, DECAY = 40, 1000, 8, 12  # steps; tokens; steps; steps


def settings(**overrides: Any) -> dict[str, Any]:
    return {
        "schedule": "cosine",
        "max_tokens": STEPS * TOKENS_PER_STEP,
        "warmup_tokens": WARMUP * TOKENS_PER_STEP,
        "decay_tokens": DECAY * TOKENS_PER_STEP,
        "decay_type": "1-sqrt",
        "min_lr_ratio": 0.0,
        **overrides,
    }


def ours(**overrides: Any) -> list[float]:
    """Fractions before each step, with as many tokens in every step, and five steps beyond."""
    options = settings(**overrides)
    return [lr_fraction(step * TOKENS_PER_STEP, **options) for step in range(STEPS + 5)]


def theirs(build: Any, **options: Any) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=1.0)
    scheduler = build(optimizer, **options)
    rates = []
    for _ in range(STEPS + 5):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


COUNTS = {"num_warmup_steps": WARMUP, "num_training_steps": STEPS}


@pytest.mark.parametrize(
    ("schedule", "build", "options"),
    [
        ("cosine", get_cosine_schedule_with_warmup, COUNTS),
        ("linear", get_linear_schedule_with_warmup, COUNTS),
        ("constant", get_constant_schedule_with_warmup, {"num_warmup_steps": WARMUP}),
    ],
)
def test_with_warmup_matches_transformers(schedule: str, build: Any, options: Any) -> None:
    expected = theirs(build, **options)
    # Theirs swings up again beyond the end of the cosine; ours stays at the bottom.
    end = STEPS + 1 if schedule == "cosine" else STEPS + 5
    # The same formula, written with other roundings.
    assert ours(schedule=schedule)[:end] == pytest.approx(expected[:end], abs=1e-12)


@pytest.mark.parametrize("decay_type", DECAYS)
@pytest.mark.parametrize("min_lr_ratio", [0.0, 0.1])
def test_wsd_matches_transformers(decay_type: str, min_lr_ratio: float) -> None:
    expected = theirs(
        get_wsd_schedule,
        num_decay_steps=DECAY,
        decay_type=decay_type,
        min_lr_ratio=min_lr_ratio,
        **COUNTS,
    )
    got = ours(schedule="wsd", decay_type=decay_type, min_lr_ratio=min_lr_ratio)
    assert got == pytest.approx(expected, abs=1e-12)


def test_cosine_to_a_floor_matches_transformers_after_the_warmup() -> None:
    """Their warm-up begins at 0 for this one, and at the floor for WSD; ours always at the
    floor."""
    expected = theirs(get_cosine_with_min_lr_schedule_with_warmup, min_lr_rate=0.1, **COUNTS)
    got = ours(min_lr_ratio=0.1)
    assert got[WARMUP : STEPS + 1] == pytest.approx(expected[WARMUP : STEPS + 1], abs=1e-12)


def test_without_warmup_matches_torch() -> None:
    cosine = theirs(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=STEPS, eta_min=0.1)
    got = ours(warmup_tokens=0, min_lr_ratio=0.1)
    # Theirs is a recursion, whose rounding adds up.
    assert got[: STEPS + 1] == pytest.approx(cosine[: STEPS + 1], abs=1e-9)
    linear = theirs(
        torch.optim.lr_scheduler.LinearLR, start_factor=1.0, end_factor=0.1, total_iters=STEPS
    )
    got = ours(schedule="linear", warmup_tokens=0, min_lr_ratio=0.1)
    assert got == pytest.approx(linear, abs=1e-9)


def test_worked_values() -> None:
    """Warm-up 10 of 100 tokens from 0.2; half of the way down is (1 + 0.2) / 2 = 0.6 on the cosine
    and the line, and 1 - sqrt(1/4) = 1/2 of the way a quarter into WSD's decay of 40."""
    options = {"max_tokens": 100, "warmup_tokens": 10, "min_lr_ratio": 0.2, "decay_tokens": 40}
    for schedule in ("cosine", "linear"):
        curve = settings(schedule=schedule, **options)
        assert [lr_fraction(t, **curve) for t in (0, 5, 10, 55, 100)] == pytest.approx(
            [0.2, 0.6, 1.0, 0.6, 0.2], abs=1e-12
        )
    wsd = settings(schedule="wsd", **options)
    assert [lr_fraction(t, **wsd) for t in (10, 60, 70, 100)] == pytest.approx([1, 1, 0.6, 0.2])


@given(
    schedule=st.sampled_from(SCHEDULES),
    decay_type=st.sampled_from(sorted(DECAYS)),
    warmup=st.integers(0, 50),
    decay=st.integers(1, 50),
    ratio=st.floats(0, 1),
)
def test_rises_then_falls_between_the_floor_and_the_peak(
    schedule: str, decay_type: str, warmup: int, decay: int, ratio: float
) -> None:
    options = settings(
        schedule=schedule,
        max_tokens=100,
        warmup_tokens=warmup,
        decay_tokens=decay,
        decay_type=decay_type,
        min_lr_ratio=ratio,
    )
    values = [lr_fraction(t, **options) for t in range(120)]
    slack = 1e-12  # rounding of neighbours
    assert all(a <= b + slack for a, b in pairwise(values[: warmup + 1]))
    assert all(a + slack >= b for a, b in pairwise(values[warmup:]))
    assert all(ratio - slack <= value <= 1 + slack for value in values)
    # To the bit: without a warm-up a constant schedule changes nothing, and the ends are as asked.
    assert values[warmup] == 1.0
    assert values[0] == (ratio if warmup else 1.0)
    assert values[100] == (1.0 if schedule == "constant" else ratio)
