"""Which samples become eligible when, by counting."""

import warnings

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lightning_align.data import intersection
from lightning_align.data.difficulty import DifficultyIndex
from lightning_align.data.eligibility import by_level, eligible_counts
from lightning_align.data.pacing import CurriculumScheduler


def linear(low, high, total, step=1):
    schedule = {"total_curriculum_step": total, "difficulty_step": step}
    return CurriculumScheduler(
        {
            "min_difficulty": low,
            "max_difficulty": high,
            "schedule_type": "fixed_linear",
            "schedule_config": schedule,
        }
    )


def levels_of(measures, schedulers, kinds):
    indices = {name: DifficultyIndex.of_values(values) for name, values in measures.items()}
    counts = {
        name: eligible_counts(name, indices[name], schedulers[name], kinds[name])
        for name in measures
    }
    return by_level(indices, counts)


def eligible_at(levels, step):
    """What is eligible at a step, by the groups."""
    total = sum(
        int(size) for size, first in zip(levels.sizes, levels.steps, strict=True) if first <= step
    )
    return set(levels.samples[:total].tolist())


def test_by_value_a_sample_waits_until_its_difficulty_is_allowed():
    levels = levels_of(
        {"length": [3, 1, 2, 5, 2]}, {"length": linear(1, 4, 4)}, {"length": "value"}
    )
    # 1 at step 1, 2 at step 2, and so on: the fixed_linear of a range that begins at 1 gives
    # floor(1 + 3 step / 4).
    assert [eligible_at(levels, step) for step in (1, 2, 3, 4)] == [
        {1},
        {1, 2, 4},
        {0, 1, 2, 4},
        {0, 1, 2, 4},
    ]
    assert levels.never_eligible == 1
    assert (levels.sizes > 0).all()


def test_by_percentile_it_is_the_easiest_part_of_the_samples():
    """A hundredth of 205 samples is 2.05, rounded down when all of them are counted."""
    difficulties = np.random.default_rng(0).integers(0, 50, 205)
    scheduler = linear(10, 100, 90)
    levels = levels_of({"rarity": difficulties}, {"rarity": scheduler}, {"rarity": "percentile"})
    order = np.argsort(difficulties, kind="stable").tolist()
    for step in (1, 30, 89, 90):
        percentile = scheduler.get_difficulty(step)
        number = 205 * percentile // 100
        assert eligible_at(levels, step) == set(order[:number])


@settings(deadline=None, max_examples=40)
@given(st.data(), st.integers(2, 60), st.sampled_from([4, 1 << 20]))
def test_with_several_measures_all_must_allow_a_sample(data, num_samples, chunk):
    """Against the definition, at every step; in chunks of few samples as well."""
    kinds = {"length": "value", "rarity": "percentile", "loss": "value"}
    measures = {
        name: data.draw(
            st.lists(st.integers(1, 9), min_size=num_samples, max_size=num_samples).filter(
                lambda values: len(set(values)) > 1
            )
        )
        for name in kinds
    }
    schedulers = {"length": linear(9, 9, 1), "rarity": linear(90, 100, 7), "loss": linear(5, 8, 9)}
    before, intersection._CHUNK = intersection._CHUNK, chunk
    try:
        levels = levels_of(measures, schedulers, kinds)
    except ValueError:  # not one is easy by all three
        assume(False)
    finally:
        intersection._CHUNK = before
    orders = {name: np.argsort(values, kind="stable") for name, values in measures.items()}
    for step in (1, 3, 5, 7, 9, 50):
        allowed = []
        for name, kind in kinds.items():
            difficulty = schedulers[name].get_difficulty(step)
            number = int((np.array(measures[name]) <= difficulty).sum())
            if kind == "percentile":
                number = num_samples * difficulty // 100
            allowed.append(set(orders[name][:number].tolist()))
        assert eligible_at(levels, step) == set.intersection(*allowed)
    assert sorted(levels.samples.tolist()) == list(range(num_samples))


def test_what_was_eligible_once_stays_eligible():
    discrete = {
        "min_difficulty": 1,
        "max_difficulty": 3,
        "schedule_type": "fixed_discrete",
        "schedule_config": {"difficulty": [2, 1, 3], "max_step": [4, 8]},
    }
    levels = levels_of(
        {"length": [1, 2, 3]}, {"length": CurriculumScheduler(discrete)}, {"length": "value"}
    )
    assert levels.sizes.tolist() == [2, 1]
    assert levels.steps == [1, 9]


def test_finer_levels_are_merged_which_is_said():
    index = DifficultyIndex.of_values(np.arange(5000))
    with pytest.warns(
        UserWarning, match="at most 1000 levels are kept apart; finer ones are merged"
    ):
        counts = eligible_counts("length", index, linear(1, 4999, 4999), "value")
    assert len(counts) <= 1000
    assert counts[-1][1] == 5000
    exact = linear(1, 4999, 4999)
    for step, count in counts:  # late, and never early
        assert count == exact.get_difficulty(step) + 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        eligible_counts("length", index, linear(1, 1000, 1000), "value")


def test_nothing_is_copied_for_one_measure():
    index = DifficultyIndex.of_values([3, 1, 2])
    levels = by_level({"length": index}, {"length": [(1, 2), (5, 3)]})
    assert levels.samples is index.order


def test_refuses_what_has_no_order():
    with pytest.raises(ValueError, match=r"'rarity'.: all samples are equally difficult, 4"):
        eligible_counts("rarity", DifficultyIndex.of_values([4, 4]), linear(1, 4, 4), "value")


def test_refuses_a_schedule_in_tokens():
    scheduler = CurriculumScheduler(
        {
            "min_difficulty": 1,
            "max_difficulty": 4,
            "schedule_type": "fixed_linear",
            "schedule_config": {"total_curriculum_tokens": 9, "difficulty_step": 1},
        }
    )
    with pytest.raises(ValueError, match="must follow from its number, and not from tokens"):
        eligible_counts("rarity", DifficultyIndex.of_values([4, 3]), scheduler, "value")


def test_refuses_a_first_step_without_samples_and_names_the_lowest_value():
    with pytest.raises(ValueError, match=r"the lowest there are: length 30\. Raise min_difficulty"):
        levels_of({"length": [30, 40]}, {"length": linear(8, 40, 10, 8)}, {"length": "value"})
