"""The sampler of a curriculum: batches, ranks and resuming."""

import json
from itertools import islice

import numpy as np
import pytest
from torch.utils.data import DataLoader

from lightning_align.data.batch_sizes import BatchSizes
from lightning_align.data.curriculum_sampler import CurriculumSampler
from lightning_align.data.pacing import CurriculumScheduler
from lightning_align.data.sampler import PositionSampler
from lightning_align.data.skipped import SkippedBatches

LENGTHS = np.random.default_rng(0).integers(1, 101, 230)
PACE = {
    "min_difficulty": 20,
    "max_difficulty": 100,
    "schedule_type": "fixed_linear",
    "schedule_config": {"total_curriculum_step": 40, "difficulty_step": 10},
}


def a_sampler(batch_size=8, **options):
    return CurriculumSampler(LENGTHS, PACE, batch_size, **{"seed": 3, **options})


def test_a_batch_has_the_difficulty_of_the_step_that_it_is_counted_from_one():
    sampler, scheduler = a_sampler(), CurriculumScheduler(PACE)
    for n in range(60):
        allowed = scheduler.get_difficulty(n + 1)
        batch = sampler.batch(n)
        assert len(batch) == 8
        assert LENGTHS[batch].max() <= allowed
        assert sampler.difficulties_at(n) == {"difficulty": allowed}
        assert sampler.num_eligible(n) == sum(length <= allowed for length in LENGTHS)


def test_it_is_a_position_sampler_of_whole_batches():
    sampler = a_sampler()
    assert isinstance(sampler, PositionSampler)
    assert len(sampler) == 29
    assert list(sampler) == [sampler.batch(n) for n in range(29)]


@pytest.mark.parametrize("replacement", [False, True])
def test_ranks_take_slices_of_one_global_batch(replacement):
    whole = a_sampler(8, replacement=replacement)
    ranks = [a_sampler(4, num_replicas=2, rank=rank, replacement=replacement) for rank in range(2)]
    for n in (0, 5, 17, 1000):
        assert whole.batch(n) == [sample for rank in ranks for sample in rank.batch(n)]


def test_over_two_ranks_every_pass_has_each_sample_once_and_groups_differ_by_one():
    """Counted over both ranks, from before the last level on."""
    ranks = [a_sampler(4, num_replicas=2, rank=rank) for rank in range(2)]
    stream = [i for n in range(39 + 3 * 230) for rank in ranks for i in rank.batch(n)]
    seen = np.zeros(230, dtype=int)
    order = ranks[0].order
    groups = np.split(order.levels.samples, order.num_eligible)[:-1]
    for place, sample in enumerate(stream[:1000]):
        seen[sample] += 1
        if place % 8 == 7:
            assert all(np.ptp(seen[group]) <= 1 for group in groups)
    all_eligible = order.starts[-1]
    assert all_eligible == 39 * 8
    for first in range(all_eligible, all_eligible + 2 * 230, 230):
        assert sorted(stream[first : first + 230]) == list(range(230))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loader_resumes_with_a_position(num_workers):
    sampler = a_sampler(position=lambda: 7)
    loader = DataLoader(Rows(), sampler=sampler, batch_size=None, num_workers=num_workers)
    assert list(islice(loader, 5)) == [sampler.batch(n) for n in range(7, 12)]


class Rows:
    def __len__(self):
        return 230

    def __getitem__(self, indices):
        return indices


def test_alone_it_counts_what_it_yielded():
    first = a_sampler()
    seen = list(islice(first, 5))
    state = json.loads(json.dumps(first.state_dict()))
    for later in (a_sampler(), a_sampler(4, num_replicas=2, rank=1)):
        later.load_state_dict(state)
        assert next(iter(later)) == later.batch(5)
    assert seen == [first.batch(n) for n in range(5)]
    # A run of epochs goes on where the last one ended, as one that is told its epochs does.
    fresh = a_sampler()
    once = list(fresh)
    fresh.set_epoch(1)
    assert [*once, *fresh] == [fresh.batch(n) for n in range(58)]
    short = a_sampler()
    begun = list(islice(short, 10))
    short.set_epoch(1)  # an epoch that ended early
    assert [*begun, *islice(short, 3)] == [short.batch(n) for n in range(13)]
    resumed = a_sampler()
    resumed.set_epoch(1)
    assert next(iter(resumed)) == resumed.batch(29)


def test_skipped_batches_are_passed_over():
    sampler = a_sampler(skipped=lambda: SkippedBatches([(2, 4)]))
    assert list(islice(sampler, 4)) == [sampler.batch(n) for n in (0, 1, 4, 5)]
    assert sampler.yielded == 4
    assert next(iter(sampler)) == sampler.batch(6)


@pytest.mark.parametrize(
    "other",
    [{"seed": 4}, {"batch_size": 4}, {"replacement": True}, {"difficulty_type": "percentile"}],
)
def test_refuses_the_state_of_another_stream(other):
    state = a_sampler().state_dict()
    with pytest.raises(ValueError, match="the state belongs to another stream"):
        a_sampler(**other).load_state_dict(state)


def test_several_measures():
    rarity = np.random.default_rng(1).random(230)
    pace = {**PACE, "min_difficulty": 50}
    sampler = CurriculumSampler(
        {"length": LENGTHS, "rarity": rarity},
        {"length": PACE, "rarity": pace},
        4,
        difficulty_type={"length": "value", "rarity": "percentile"},
    )
    rank = np.argsort(np.argsort(rarity, kind="stable"))
    for n in range(50):
        batch, allowed = sampler.batch(n), sampler.difficulties_at(n)
        assert LENGTHS[batch].max() <= allowed["length"]
        assert rank[batch].max() < 230 * allowed["rarity"] // 100


def test_what_was_never_seen_is_counted():
    short = {**PACE, "max_difficulty": 90}
    sampler = CurriculumSampler(LENGTHS, short, 8)
    assert sampler.never_seen(0)["not_drawn"] == (LENGTHS <= 90).sum()
    seen = {i for n in range(25) for i in sampler.batch(n)}
    assert sampler.never_seen(25) == {
        "never_eligible": (LENGTHS > 90).sum(),
        "not_drawn": (LENGTHS <= 90).sum() - len(seen),
    }


def test_what_was_passed_over_was_not_seen():
    skipped = SkippedBatches([(2, 9), (30, 40)])
    sampler = a_sampler(skipped=lambda: skipped)
    for n in (0, 5, 9, 12, 35):
        kept = [m for m in range(n) if not any(a <= m < b for a, b in skipped.ranges)]
        seen = {i for m in kept for i in sampler.batch(m)}
        assert sampler.never_seen(n) == {"never_eligible": 0, "not_drawn": 230 - len(seen)}


def test_warns_of_a_batch_larger_than_what_is_eligible():
    few = (LENGTHS <= 20).sum()
    with pytest.warns(UserWarning, match=f"{few} samples are eligible at the first step"):
        a_sampler(int(few) + 1)


@pytest.mark.parametrize(
    ("difficulties", "scheduler", "options", "message"),
    [
        ({}, {}, {}, r"difficulties=\{\}\): must have a measure"),
        ({"a": [1, 2]}, {"b": PACE}, {}, r"scheduler=\['b'\]\): must have the names .*, a\."),
        ({"a": [1, 2]}, {"a": PACE}, {"difficulty_type": {}}, r"difficulty_type=\[\]\): must hav"),
        ({"a": [1, 2], "b": [1, 2, 3]}, {"a": PACE, "b": PACE}, {}, "must be of the same samples"),
        ([1, 2], PACE, {"difficulty_type": "rank"}, "must be one of 'value', 'percentile'"),
        ([1, 2], PACE, {"batch_size": 0}, r"batch_size=0\): must be at least 1"),
        ([1, 2], PACE, {"num_replicas": 0}, r"num_replicas=0\): must be at least 1"),
        ([1, 2], PACE, {"rank": 1}, r"rank=1\): must be in \[0, 1\)"),
        ([30, 40], PACE, {}, r"the lowest there are: difficulty 30\. Raise min_difficulty"),
    ],
)
def test_refuses(difficulties, scheduler, options, message):
    with pytest.raises(ValueError, match=message):
        CurriculumSampler(difficulties, scheduler, **{"batch_size": 1, **options})


@pytest.mark.parametrize(
    ("difficulties", "message"),
    [
        ([], "must be one number for each sample"),
        ([[1], [2]], "must be one number for each sample"),
        (["a", "b"], "must be one number for each sample"),
        ([1.0, float("nan"), 2.0], r"rarity=nan\): must be finite; sample 1 is the first"),
        ([1.0, 2.0, float("inf")], r"rarity=inf\): must be finite; sample 2 is the first"),
        ([7, 7], "all samples are equally difficult, 7: they have no order"),
    ],
)
def test_refuses_difficulties_that_give_no_order(difficulties, message):
    with pytest.raises(ValueError, match=f"CurriculumSampler.*{message}"):
        CurriculumSampler({"rarity": difficulties}, {"rarity": PACE}, 1)


def test_the_position_is_asked_once_and_when_an_iteration_starts():
    asked = []
    sampler = a_sampler(position=lambda: asked.append(0) or 7)
    iterator = iter(sampler)
    assert (asked, sampler.start) == ([0], 7)
    assert next(iterator) == sampler.batch(7)
    assert len(asked) == 1


SELF_PACED = {
    "min_difficulty": 20,
    "max_difficulty": 100,
    "schedule_type": "self_paced",
    "schedule_config": {"difficulty_step": 40, "window": 5, "lag": 3},
}


def a_self_paced_run(sampler, number):
    """Batches as a loader that runs ahead by the lag draws them, with losses that stay."""
    (scheduler,) = sampler.schedulers.values()
    drawn = []
    for n in range(number):
        while len(drawn) <= n + 3:
            drawn.append(sampler.batch(len(drawn)))
        scheduler.observe(n + 1, 2.0)
    return drawn


def test_a_self_paced_curriculum_goes_up_where_that_is_decided():
    sampler = CurriculumSampler(LENGTHS, SELF_PACED, 8, seed=3)
    drawn = a_self_paced_run(sampler, 60)
    (scheduler,) = sampler.schedulers.values()
    assert [tuple(decision) for decision in scheduler.decisions] == [
        *((0, 0), (13, 1), (26, 2), (39, 3))
    ]
    for n, batch in enumerate(drawn):
        assert LENGTHS[batch].max() <= sampler.difficulties_at(n)["difficulty"]
        assert sampler.batch(n) == batch
    assert sampler.num_eligible(50) == 230
    assert sampler.never_seen(0) == {"never_eligible": 0, "not_drawn": 230}
    seen = np.zeros(230, dtype=int)
    for batch in drawn[13:39]:
        np.add.at(seen, batch, 1)
    assert all(np.ptp(seen[(low < LENGTHS) & (high >= LENGTHS)]) <= 1 for low, high in ((20, 40),))


def test_a_self_paced_curriculum_over_two_ranks_and_behind_its_state():
    whole = CurriculumSampler(LENGTHS, SELF_PACED, 8, seed=3)
    drawn = a_self_paced_run(whole, 30)
    (decided,) = whole.schedulers.values()
    state = json.loads(json.dumps(decided.state_dict()))
    ranks = [
        CurriculumSampler(LENGTHS, SELF_PACED, 4, seed=3, num_replicas=2, rank=rank)
        for rank in range(2)
    ]
    for rank in ranks:
        (scheduler,) = rank.schedulers.values()
        scheduler.load_state_dict(state)
        assert rank.stream() == whole.stream()
    for n, batch in enumerate(drawn):
        assert [sample for rank in ranks for sample in rank.batch(n)] == batch


def test_a_self_paced_batch_that_is_not_decided_yet_is_refused():
    sampler = CurriculumSampler(LENGTHS, SELF_PACED, 8)
    with pytest.raises(ValueError, match=r"SelfPaced\(lag=3\): batch 4 is drawn 4 batches ahead"):
        sampler.batch(4)


def test_a_self_paced_measure_is_the_only_one_and_has_one_size_of_batches():
    with pytest.raises(ValueError, match="a is self-paced, and then it is the only measure"):
        CurriculumSampler({"a": LENGTHS, "b": LENGTHS}, {"a": SELF_PACED, "b": PACE}, 8)
    with pytest.raises(ValueError, match="a self-paced order has batches of one size"):
        CurriculumSampler(LENGTHS, SELF_PACED, 8, batch_sizes=BatchSizes([(0, 4), (9, 8)]))
