"""Which parameters GaLore projects, and what a group may say."""

import math
import warnings

import pytest
import torch
from torch import nn

from lightning_align.optimizers.galore_groups import (
    check_group,
    check_integer,
    is_projected,
    rank_of,
    state_shapes,
    warn_of_embeddings,
    without_rank_if_others_name_it,
)


def group(*shapes, **options):
    params = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    names = [f"weight{number}" for number in range(len(shapes))]
    defaults = {
        "params": params,
        "param_names": names,
        "lr": 1e-3,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": 0.0,
        "scale": 0.25,
        "update_proj_gap": 200,
        "projection": "subspace",
        "proj_type": "std",
        "rank": 3,
        "rank_is_asked_for": False,
    }
    return {**defaults, **options}


@pytest.mark.parametrize(
    ("shape", "by_default", "asked_for"),
    [
        ((12, 8), True, True),
        ((4, 12), True, True),
        ((3, 12), False, True),  # no smaller in a subspace
        ((0, 12), False, False),
        ((9,), False, True),  # which check_group refuses
    ],
)
def test_which_parameters_are_projected(shape, by_default, asked_for):
    for options, expected in (
        ({}, by_default),
        ({"rank_is_asked_for": True}, asked_for),
        ({"rank": None, "rank_is_asked_for": True}, False),
    ):
        ours = group(shape, **options)
        assert is_projected(ours, ours["params"][0]) is expected


def test_a_rank_is_cut_to_the_shorter_side():
    ours = group((12, 8), (8, 2), rank=6)
    assert [rank_of(ours, weight) for weight in ours["params"]] == [6, 2]


@pytest.mark.parametrize(
    ("proj_type", "shape", "moments", "bases"),
    [
        ("std", (12, 8), (12, 3), {"basis_right": (8, 3)}),
        ("std", (8, 12), (3, 12), {"basis_left": (8, 3)}),
        ("left", (12, 8), (3, 8), {"basis_left": (12, 3)}),
        ("full", (12, 8), (3, 3), {"basis_left": (12, 3), "basis_right": (8, 3)}),
        ("std", (9,), (9,), {}),
    ],
)
def test_shapes_of_a_state(proj_type, shape, moments, bases):
    ours = group(shape, proj_type=proj_type)
    expected = {"step": (), "exp_avg": moments, "exp_avg_sq": moments, **bases}
    assert state_shapes(ours, ours["params"][0]) == expected


def test_shapes_of_a_state_of_another_rank():
    ours = group((12, 8))
    shapes = state_shapes(ours, ours["params"][0], rank=5)
    assert (shapes["exp_avg"], shapes["basis_right"]) == ((12, 5), (8, 5))


def test_groups_without_a_rank_get_none_only_where_others_name_one():
    weight = nn.Parameter(torch.zeros(2, 2))
    plain, ranked = {"params": [weight]}, {"params": [weight], "rank": 2}
    assert without_rank_if_others_name_it([plain, ranked]) == [{"rank": None, **plain}, ranked]
    assert without_rank_if_others_name_it(iter([plain])) == [plain]
    assert without_rank_if_others_name_it(item for item in [weight])[0] is weight
    assert without_rank_if_others_name_it(weight) is weight
    assert without_rank_if_others_name_it(ranked) is ranked
    assert "rank" not in plain


def test_a_group_in_order_says_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_group(group((12, 8), (9,)))
        check_group(group((12, 8), rank_is_asked_for=True))
        check_group(group((9,), (2, 2), rank=None, rank_is_asked_for=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, r"rank=0\): must be an integer of at least 1"),
        ({"update_proj_gap": 0}, r"update_proj_gap=0\): must be an integer of at least 1"),
        ({"scale": 0.0}, r"scale=0.0\): must be a number above 0"),
        ({"lr": math.nan}, r"lr=nan\): must be"),
        ({"betas": (0.9, 1.0)}, r"betas=\(0.9, 1.0\)\): must be"),
        ({"eps": -1e-8}, r"eps=-1e-08\): must be"),
        ({"weight_decay": -0.1}, r"weight_decay=-0.1\): must be"),
        ({"proj_type": "diag"}, r"proj_type='diag'\): must be one of 'std', 'reverse_std'"),
        ({"projection": "qr"}, r"projection='qr'\): must be one of 'subspace', 'eigh'"),
    ],
    ids=str,
)
def test_an_option_out_of_range_is_named(options, message):
    with pytest.raises(ValueError, match=r"GaLoreAdamW\(" + message):
        check_group(group((12, 8), **options))


def test_what_is_no_matrix_is_named_where_a_rank_is_asked_for():
    message = r"params=.*weight1.*\): has 1 dimensions, and a group with a rank.*rank=None"
    with pytest.raises(ValueError, match=message):
        check_group(group((12, 8), (9,), rank_is_asked_for=True))


def test_ranks_that_are_cut_are_warned_of_once_with_the_first_three_names():
    ours = group(*[(2, 12)] * 5, (12, 8), rank_is_asked_for=True)
    with pytest.warns(
        UserWarning, match=r"rank=3\): .*weight0.*weight2.* and 2 more, whose"
    ) as found:
        check_group(ours)
    assert len(found) == 1
    assert "weight3" not in str(found[0].message)


@pytest.mark.parametrize("value", [0, 2.0, True, "3", None])
def test_an_integer_is_one(value):
    check_integer("seed", 1, least=1)
    with pytest.raises(ValueError, match=r"\(seed=.*\): must be an integer of at least 1"):
        check_integer("seed", value, least=1)


BLOCK = [(32, 32), (64, 32), (32, 64)]


@pytest.mark.parametrize("tied", [False, True])
def test_what_looks_like_an_embedding_is_named_where_nothing_says_that_it_is_none(tied):
    shapes = [(256, 32), *BLOCK, *BLOCK, *([] if tied else [(256, 32)])]
    ours = group(*shapes, rank_is_asked_for=False)
    message = r"params=.*weight0.* looks like an embedding.*Pass build_param_groups\(module"
    with pytest.warns(UserWarning, match=message):
        warn_of_embeddings([ours])


@pytest.mark.parametrize(
    ("shapes", "options"),
    [
        ([(256, 32), *BLOCK], {"rank_is_asked_for": True}),
        ([(256, 32), *BLOCK], {"rank_is_asked_for": False, "use_muon": True}),
        ([*BLOCK, *BLOCK, *BLOCK], {"rank_is_asked_for": False}),
        ([(256, 32), (32, 10)], {"rank_is_asked_for": False}),
    ],
    ids=["a rank is named", "sorted", "blocks alone", "two matrices"],
)
def test_nothing_is_said_of_what_was_sorted_or_is_no_language_model(shapes, options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_embeddings([group(*shapes, **options)])
