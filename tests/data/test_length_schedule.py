"""Lengths by batch: steps as DeepSpeed counts them, and tokens as they are planned."""

from itertools import pairwise
from typing import Any

import pytest

from lightning_align.data.length_schedule import LengthSchedule, Samples
from lightning_align.data.pacing import CurriculumScheduler


def linear(unit: str = "step", total: int = 100, most: int = 64, each: int = 8) -> Any:
    schedule = {f"total_curriculum_{unit}": total, "difficulty_step": each}
    return CurriculumScheduler(
        {
            "min_difficulty": 8,
            "max_difficulty": most,
            "schedule_type": "fixed_linear",
            "schedule_config": schedule,
        }
    )


def test_batch_n_has_the_length_of_step_n_plus_one() -> None:
    scheduler = linear()
    schedule = LengthSchedule(scheduler, "truncate")
    expected = [scheduler.get_difficulty(n + 1) for n in range(200)]
    assert [schedule.length_at(n) for n in range(200)] == expected
    assert schedule.distinct == [8, 16, 24, 32, 40, 48, 56, 64]


@pytest.mark.parametrize("mode", ["truncate", "reshape"])
@pytest.mark.parametrize("batch", [1, 3, 50])
def test_by_tokens_a_batch_has_the_length_that_all_batches_before_it_have_reached(
    mode: str, batch: int
) -> None:
    """Against counting: 70 predictions a row, so that reshaping leaves remainders."""
    whole, scheduler = 70, linear("tokens", total=9000)
    schedule = LengthSchedule(scheduler, mode, Samples.constant(batch, whole))
    tokens = 0
    for n in range(600 // batch):
        length = scheduler.get_difficulty(max(tokens, 1))
        assert schedule.length_at(n) == length
        assert schedule.tokens_before(n) == tokens
        tokens += batch * (length if mode == "truncate" else whole // length * length)
    assert length == 64


def test_tokens_of_schedules_by_steps_are_planned_too() -> None:
    schedule = LengthSchedule(linear(), "truncate", Samples.constant(4, 64))
    counted = [schedule.tokens_before(n) for n in range(150)]
    assert counted[0] == 0
    steps = [later - earlier for earlier, later in pairwise(counted)]
    assert steps == [4 * schedule.length_at(n) for n in range(149)]
    assert LengthSchedule(linear(), "truncate").tokens_before(3) is None


def test_a_warm_up_shorter_than_one_step_of_length_is_over_at_once() -> None:
    assert LengthSchedule(linear(total=1), "reshape").stretches() == [(0, 64)]
    assert LengthSchedule(linear(total=2), "reshape").stretches() == [(0, 32), (1, 64)]


def test_the_number_of_lengths_is_bounded() -> None:
    with pytest.raises(ValueError, match=r"max_lengths=7\): the schedule has 8 lengths from 8 to"):
        LengthSchedule(linear(), "truncate", max_lengths=7)


def test_tokens_of_batches_that_nobody_knows_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Give length\.block_size"):
        LengthSchedule(linear("tokens"), "truncate")


def test_a_row_without_predictions_is_refused() -> None:
    scheduler = CurriculumScheduler(
        {
            "min_difficulty": 0,
            "max_difficulty": 8,
            "schedule_type": "fixed_discrete",
            "schedule_config": {"difficulty": [0, 8], "max_step": [3]},
        }
    )
    with pytest.raises(ValueError, match="at least 1 token to predict"):
        LengthSchedule(scheduler, "truncate")


def test_samples_of_batches_that_grow() -> None:
    """Sizes 1, 1, 2, 2, 2, ...: by tokens the length follows what batches of these sizes have."""
    samples = Samples(lambda n: min(n, 2) + 2 * max(0, n - 2), whole=64)
    assert [samples.batches_for(many) for many in range(8)] == [0, 1, 2, 3, 3, 4, 4, 5]
    scheduler = linear("tokens", total=2000)
    schedule = LengthSchedule(scheduler, "truncate", samples)
    tokens = 0
    for n in range(60):
        assert schedule.length_at(n) == scheduler.get_difficulty(max(tokens, 1))
        assert schedule.tokens_before(n) == tokens
        tokens += (samples.before(n + 1) - samples.before(n)) * schedule.length_at(n)
