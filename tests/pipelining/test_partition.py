"""Stages cover the chain and none of them could be smaller."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_align.pipelining import partition, partition_table

CHAINS = st.lists(st.integers(0, 20), min_size=1, max_size=8)


def largest(stages: list[tuple[int, int]], costs: list[int], first: int, last: int) -> int:
    sums = [sum(costs[begin:end]) for begin, end in stages]
    sums[0] += first
    sums[-1] += last
    return max(sums)


@given(costs=CHAINS, first=st.integers(0, 30), last=st.integers(0, 30), data=st.data())
def test_no_other_cut_has_a_smaller_largest_stage(
    costs: list[int], first: int, last: int, data: st.DataObject
) -> None:
    num_stages = data.draw(st.integers(1, len(costs)))
    ours = partition(costs, num_stages, first_cost=first, last_cost=last)
    cuts = itertools.combinations(range(1, len(costs)), num_stages - 1)
    best = min(
        largest(list(itertools.pairwise([0, *cut, len(costs)])), costs, first, last) for cut in cuts
    )
    assert largest(ours, costs, first, last) == best


@given(
    costs=st.lists(st.floats(0, 1e12), min_size=1, max_size=60),
    method=st.sampled_from(["parameters", "uniform", "profile", "type:Block"]),
    data=st.data(),
)
def test_stages_are_contiguous_cover_every_layer_and_are_never_empty(
    costs: list[float], method: str, data: st.DataObject
) -> None:
    num_stages = data.draw(st.integers(1, len(costs)))
    names = ["Block"] * len(costs)
    stages = partition(costs, num_stages, method, type_names=names)
    assert len(stages) == num_stages
    assert [begin for begin, _ in stages] == [0, *(end for _, end in stages[:-1])]
    assert stages[-1][1] == len(costs)
    assert all(begin < end for begin, end in stages)


def test_embeddings_and_head_take_layers_from_the_first_and_the_last_stage() -> None:
    """8 blocks of 2, embeddings worth 2 blocks, a head worth 1: 11 units over 4 ranks.

    3 units at most on a stage: 1 block beside the embeddings, 2 beside the head; the 5 blocks
    between go as 2 and 3, fewer on the earlier stage.
    """
    costs = [2.0] * 8
    stages = partition(costs, 4, first_cost=4.0, last_cost=2.0)
    assert stages == [(0, 1), (1, 3), (3, 6), (6, 8)]
    assert partition(costs, 4, "uniform", first_cost=4.0, last_cost=2.0) == [
        (0, 2),
        (2, 4),
        (4, 6),
        (6, 8),
    ]


def test_where_the_head_alone_is_the_largest_the_others_are_still_even() -> None:
    assert partition([1.0] * 10, 4, last_cost=100.0) == [(0, 3), (3, 6), (6, 9), (9, 10)]


def test_earlier_stages_get_fewer_layers_because_they_keep_more_microbatches() -> None:
    assert partition([1.0] * 10, 4) == [(0, 2), (2, 4), (4, 7), (7, 10)]


def test_type_balances_the_layers_whose_class_matches() -> None:
    names = ["Embedding", "LlamaBlock", "Pool", "Pool", "LlamaBlock", "Norm", "Head"]
    stages = partition([9.0] * 7, 2, "type:block", type_names=names)
    assert [sum(name == "LlamaBlock" for name in names[b:e]) for b, e in stages] == [1, 1]


def test_a_list_is_the_number_of_layers_of_each_stage() -> None:
    assert partition([1.0] * 7, 3, [1, 4, 2]) == [(0, 1), (1, 5), (5, 7)]


def test_the_table_shows_every_stage_with_its_rank_and_share() -> None:
    table = partition_table(
        [(0, 1), (1, 3), (3, 4), (4, 5)], [1000.0] * 5, first_cost=2000, last_cost=1000, num_ranks=2
    )
    assert table.splitlines() == [
        "stage  rank  layers         parameters  share",
        "    0     0  embeddings, 0       3,000  37.5%",
        "    1     1  1-2                 2,000  25.0%",
        "    2     0  3                   1,000  12.5%",
        "    3     1  4, head             2,000  25.0%",
    ]


@pytest.mark.parametrize(
    ("costs", "num_stages", "method", "message"),
    [
        ([1.0] * 3, 4, "parameters", r"partition\(num_stages=4\): 4 stages need a layer each, and"),
        ([1.0] * 3, 0, "parameters", r"\(num_stages=0\): must be at least 1"),
        ([1.0] * 3, 2, "greedy", r"\(partition_method='greedy'\): must be 'parameters', 'uniform'"),
        ([1.0] * 3, 2, [1, 1], r"\(partition_method=\[1, 1\]\): must be 2 numbers .* the sum 3"),
        ([1.0] * 3, 2, [0, 3], r"each at least 1"),
        ([1.0, -1.0], 2, "parameters", r"\(costs=\[1.0, -1.0\]\): must be finite and not neg"),
        ([1.0, float("nan")], 2, "profile", r"must be finite"),
        ([1.0, 10**400], 2, "profile", r"must be finite"),
        ([1.0] * 3, 2, "type:[", r"'type:\['\): is not a regular expression"),
        ([1.0] * 3, 2, "type:Norm", r"matches 1 layers of 3, for 2 stages. The layers are Block, "),
    ],
)
def test_bad_input_is_named(costs: list, num_stages: int, method: object, message: str) -> None:
    names = ["Block", "Block", "Norm"][: len(costs)]
    with pytest.raises(ValueError, match=message):
        partition(costs, num_stages, method, type_names=names)


@pytest.mark.parametrize("factor", [1e300, 1e-300])
def test_costs_whose_squares_are_no_numbers(factor: float) -> None:
    costs = [5.0, 1.0, 1.0, 1.0, 3.0]
    expected = partition(costs, 3, last_cost=1.0)
    assert partition([factor * cost for cost in costs], 3, last_cost=factor) == expected


def test_type_without_class_names_is_named() -> None:
    with pytest.raises(ValueError, match="needs the class names of the 2 layers"):
        partition([1.0, 1.0], 2, "type:Block")


def test_the_error_speaks_of_the_class_that_the_user_called() -> None:
    with pytest.raises(ValueError, match=r"PipelineStrategy\(pipeline_parallel_size=4\): 4 stages"):
        partition([1.0], 4, where="PipelineStrategy", stages_argument="pipeline_parallel_size")
