"""Pacing in numbers that are known; parity with DeepSpeed is in test_pacing_matches_deepspeed."""

import warnings
from itertools import islice, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_align.data.pacing import CurriculumScheduler, competence, half_cosine, root


def config(schedule_type="fixed_linear", low=8, high=64, **schedule):
    if schedule_type not in ("fixed_discrete", "custom"):
        schedule = {"total_curriculum_step": 100, "difficulty_step": 8, **schedule}
    return {
        "min_difficulty": low,
        "max_difficulty": high,
        "schedule_type": schedule_type,
        "schedule_config": schedule,
    }


def at(scheduler, *steps):
    return [scheduler.get_difficulty(step) for step in steps]


def test_linear_and_root():
    """A quarter of the steps is a quarter of the way, and by the square root a half."""
    linear = CurriculumScheduler(config(low=0, high=80))
    square = CurriculumScheduler(config("fixed_root", low=0, high=80, root_degree=2))
    assert at(linear, 0, 25, 50, 100, 101) == [0, 16, 40, 80, 80]
    assert at(square, 0, 25, 64, 100, 101) == [0, 40, 64, 80, 80]


def test_discrete():
    scheduler = CurriculumScheduler(
        config("fixed_discrete", 1, 3, difficulty=[1, 2, 3], max_step=[5, 10])
    )
    assert at(scheduler, 0, 5, 6, 10, 11, 99) == [1, 1, 2, 2, 3, 3]
    assert [*scheduler.changes()] == [(1, 1), (6, 2), (11, 3)]


def test_competence_is_that_of_the_paper():
    """c(t) = sqrt(t (1 - c0^2) / T + c0^2): with c0 = 0.6 and t = T / 2, sqrt(0.68)."""
    scheduler = CurriculumScheduler(config("competence", 60, 100, difficulty_step=1))
    assert competence(0.5, 0.6, 2) == pytest.approx(0.68**0.5)
    assert at(scheduler, 0, 50, 100, 200) == [60, 82, 100, 100]


def test_cosine_is_half_way_at_the_middle_and_slow_at_both_ends():
    scheduler = CurriculumScheduler(config("cosine", 0, 100, difficulty_step=1))
    assert half_cosine(0.5) == pytest.approx(0.5)
    assert at(scheduler, 0, 10, 90, 100) == [0, 2, 97, 100]
    assert 49 <= scheduler.get_difficulty(50) <= 50


def test_oddities_of_deepspeed_are_kept():
    """The first multiple above the least difficulty; a greatest one that is none comes late."""
    assert CurriculumScheduler(config(low=10)).get_difficulty(0) == 16
    late = CurriculumScheduler(config(low=8, high=100))
    assert at(late, 99, 100, 103, 105, 200) == [96, 96, 96, 100, 100]
    assert [*late.changes()][-1] == (105, 100)


def test_a_schedule_in_tokens():
    schedule = {"total_curriculum_tokens": 10**9, "difficulty_step": 8}
    scheduler = CurriculumScheduler({**config(low=0, high=80), "schedule_config": schedule})
    assert scheduler.unit == "tokens"
    assert at(scheduler, 0, 5 * 10**8, 10**9) == [0, 40, 80]
    discrete = config("fixed_discrete", 1, 2, difficulty=[1, 2], max_tokens=[10**6])
    scheduler = CurriculumScheduler(discrete)
    assert scheduler.unit == "tokens"
    assert at(scheduler, 10**6, 10**6 + 1) == [1, 2]
    assert CurriculumScheduler(config()).unit == "step"


def test_a_custom_schedule_is_a_function_of_the_step():
    scheduler = CurriculumScheduler(
        config("custom", total_curriculum_step=4), lambda step: step // 2
    )
    assert at(scheduler, 0, 3, 9) == [0, 1, 4]
    assert [*scheduler.changes()] == [(1, 0), (2, 1), (4, 2)]
    scheduler.set_custom_get_difficulty(lambda step: 7)
    assert at(scheduler, 0, 3) == [7, 7]


rising = st.builds(
    config,
    st.sampled_from(["fixed_linear", "fixed_root", "cosine", "competence"]),
    low=st.integers(1, 30),
    high=st.integers(60, 300),
    total_curriculum_step=st.integers(1, 300),
    difficulty_step=st.integers(1, 20),
    root_degree=st.sampled_from([0.5, 1, 2, 3]),
)


@given(rising)
def test_never_falls_and_stays_in_its_range(settings):
    scheduler = CurriculumScheduler(settings)
    found = at(scheduler, *range(400))
    assert found == sorted(found)
    assert min(found) >= settings["min_difficulty"]
    assert max(found) <= settings["max_difficulty"]
    assert scheduler.get_difficulty(10**7) == settings["max_difficulty"]


@given(rising)
def test_changes_are_all_there_is(settings):
    """Found by bisection, against every step."""
    scheduler = CurriculumScheduler(settings)
    found = dict(scheduler.changes())
    now = None
    for step in range(1, 700):
        now = found.get(step, now)
        assert now == scheduler.get_difficulty(step)


@pytest.mark.parametrize("degree", [0.5, 1])
def test_changes_are_found_one_by_one_and_cost_a_few_questions_each(monkeypatch, degree):
    """Of a thousand million only those that are asked for, each near where it is expected."""
    schedule = {"total_curriculum_step": 10**18, "difficulty_step": 1, "root_degree": degree}
    scheduler = CurriculumScheduler(config("fixed_root", 0, 10**9, **schedule))
    asked, get_difficulty = [], scheduler.get_difficulty
    monkeypatch.setattr(
        scheduler, "get_difficulty", lambda step: asked.append(step) or get_difficulty(step)
    )
    changes = [*islice(scheduler.changes(), 500)]
    assert len(asked) < 100 * 500
    first = changes[0][1]
    assert [difficulty for _, difficulty in changes] == [*range(first, first + 500)]
    for (before, _), (step, difficulty) in pairwise(changes):
        assert before < step
        assert get_difficulty(step - 1) < difficulty == get_difficulty(step)


def test_the_end_is_where_nothing_changes_any_more():
    assert CurriculumScheduler(config()).end == 100
    assert CurriculumScheduler(config(low=8, high=100)).end == 200
    discrete = config("fixed_discrete", 1, 3, difficulty=[1, 2, 3], max_step=[5, 10.5])
    assert CurriculumScheduler(discrete).end == 11
    assert [*CurriculumScheduler(discrete).changes()] == [(1, 1), (6, 2), (11, 3)]


def test_a_warm_up_of_one_step_is_over_at_once():
    scheduler = CurriculumScheduler(config(total_curriculum_step=1))
    assert at(scheduler, 0, 1) == [8, 64]
    assert [*scheduler.changes()] == [(1, 64)]


def test_a_range_of_nothing_is_constant():
    assert [*CurriculumScheduler(config(low=64)).changes()] == [(1, 64)]


def without(key):
    return {name: value for name, value in config().items() if name != key}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (without("min_difficulty"), r"config=.*: needs min_difficulty"),
        (without("schedule_type"), r"needs schedule_type"),
        (without("schedule_config"), r"fixed_linear needs difficulty_step, total_curriculum_step"),
        (config("exponential"), r"schedule_type='exponential'\): must be one of 'fixed_linear'"),
        (config(low=65), r"min_difficulty=65\): must not be above max_difficulty, 64"),
        (config(low=float("nan")), r"min_difficulty=nan\): must be a finite number"),
        (config(high=float("inf")), r"max_difficulty=inf\): must be a finite number"),
        (config(low="8"), r"min_difficulty='8'\): must be a finite number"),
        (config(total_curriculum_step=0), r"total_curriculum_step=0\): must be positive"),
        (config(total_curriculum_step=float("nan")), r"total_curriculum_step=nan\): must be a fin"),
        (config(difficulty_step=0), r"difficulty_step=0\): must be positive"),
        (config(difficulty_step=1000), r"difficulty_step=1000\): leaves one difficulty, 64, at ev"),
        (config("fixed_root"), r"fixed_root needs root_degree"),
        (config("fixed_root", root_degree=0), r"root_degree=0\): must be positive"),
        (config("competence", low=0), r"min_difficulty=0\): must be positive: the competence"),
        (config(typo=1), r"schedule_config=\['typo'\]\): fixed_linear knows difficulty_step"),
        (config("fixed_discrete", difficulty=[1]), r"fixed_discrete needs max_step"),
        (config("fixed_discrete", difficulty=[1], max_step=[]), r"max_step=\[\]\): must be a list"),
        (
            config("fixed_discrete", difficulty=[1], max_step=[3]),
            r"difficulty=\[1\]\): must be one",
        ),
        (
            config("fixed_discrete", difficulty=[1, 2, 64], max_step=[3, 2]),
            r"max_step=\[3, 2\]\): must not fall",
        ),
        (
            config("fixed_discrete", difficulty=[1, float("nan")], max_step=[3]),
            r"difficulty=\[1, nan\]\): must be a list of finite numbers",
        ),
        (config("custom", total_curriculum_step=0), r"total_curriculum_step=0\): must be at least"),
    ],
)
def test_refuses(given, message):
    with pytest.raises(ValueError, match=f"CurriculumScheduler.*{message}"):
        CurriculumScheduler(given)


def test_refuses_a_function_that_gives_no_number_and_one_that_never_ends():
    scheduler = CurriculumScheduler(config("custom"))
    with pytest.raises(ValueError, match="a custom schedule needs a function of the step"):
        scheduler.get_difficulty(1)
    scheduler.set_custom_get_difficulty(lambda step: float("nan"))
    with pytest.raises(ValueError, match="must give a finite number, and gave nan at step 3"):
        scheduler.get_difficulty(3)
    with pytest.raises(ValueError, match=r"must say when it ends. Give total_curriculum_step"):
        next(scheduler.changes())
    with pytest.raises(ValueError, match=r"step=-1\): must not be negative"):
        scheduler.get_difficulty(-1)


def test_warns_of_a_maximum_that_is_never_reached_and_of_a_step_beyond_the_range():
    discrete = config("fixed_discrete", difficulty=[1, 2], max_step=[3])
    with pytest.warns(UserWarning, match="never reaches max_difficulty, 64"):
        CurriculumScheduler(discrete)
    with pytest.warns(UserWarning, match=r"difficulty_step=8\): is beyond the range, 4"):
        CurriculumScheduler(config(low=8, high=12))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CurriculumScheduler(config())


def test_the_root_is_one_at_the_end():
    assert root(1.0, 3) == 1
    assert root(0.125, 3) == pytest.approx(0.5)
