"""Parameters that lie on several ranks: FSDP2's DTensors, and other parameters on each rank."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.debug import CommDebugMode

from lightning_align import GaLoreAdamW, Muon, StableAdamW
from tests.helpers.ranks import run_ranks

# 33 and 29 rows do not go into two: the ranks hold parts of different sizes.
MUON = partial(Muon, lr=0.02, adamw_lr=0.01)
GALORE = partial(GaLoreAdamW, lr=0.01, rank=3, update_proj_gap=2)  # 3 rows of moments on two ranks
SHARDED: dict[str, Callable[..., Any]] = {
    "Muon-newton_schulz": partial(MUON, backend="newton_schulz"),
    "Muon-eigh": partial(MUON, backend="eigh"),
    "StableAdamW": partial(StableAdamW, lr=0.01),
    "GaLoreAdamW": partial(GALORE, projection="subspace"),
    "GaLoreAdamW-svd": partial(GALORE, projection="svd", proj_type="left", weight_decay=0.1),
    "GaLoreAdamW-right": partial(GALORE, proj_type="right", stagger=False, rotate_moments=True),
    "GaLoreAdamW-full": partial(GALORE, proj_type="full", rotate_moments=True),
    "GaLoreAdamW-rank-1": partial(GaLoreAdamW, lr=0.01, rank=1, proj_type="left"),
}

PARTS = ("exp_avg", "exp_avg_sq", "basis_left", "basis_right")


def model_of(*, sharded: bool) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 33), nn.LayerNorm(33), nn.Linear(33, 29))
    if sharded:
        for layer in model:
            fully_shard(layer)
        fully_shard(model)
    return model


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    named = list(model.named_parameters())
    return [
        {"params": [(n, p) for n, p in named if (p.ndim == 2) is use_muon], "use_muon": use_muon}
        for use_muon in (True, False)
    ]


def backward(model: nn.Module, step: int) -> None:
    model.zero_grad()
    inputs = torch.randn(64, 12, generator=torch.Generator().manual_seed(step))
    model(inputs).square().mean().backward()


def train(model: nn.Module, optimizer: Any, steps: range) -> dict[str, Tensor]:
    for step in steps:
        backward(model, step)
        optimizer.step()
    return whole(model)


def whole(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
    }


def spoil(model: nn.Module, name: str, value: float = float("nan")) -> None:
    """A NaN, or another value, into what this rank holds of a gradient."""
    gradient = dict(model.named_parameters())[name].grad
    part = gradient.to_local() if isinstance(gradient, DTensor) else gradient
    part.view(-1)[-1] = value  # type: ignore[union-attr]


def test_dtensors_step_as_whole_parameters_do() -> None:
    def on_a_rank(rank: int) -> dict[str, dict[str, Tensor]]:
        trained = {}
        for name, build in SHARDED.items():
            model = model_of(sharded=True)
            optimizer = build(groups_of(model))
            train(model, optimizer, range(2))
            resumed = build(groups_of(model))
            resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            trained[name] = train(model, resumed, range(2, 4))
        return trained

    results = run_ranks(on_a_rank)
    for name, build in SHARDED.items():
        model = model_of(sharded=False)
        theirs = train(model, build(groups_of(model)), range(4))
        # Another order of summation, which eigh magnifies where singular values are near zero.
        tolerance = 1e-4 if "eigh" in name else 1e-5
        for trained in results:
            for key, ours in trained[name].items():
                torch.testing.assert_close(ours, theirs[key], rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("bad_rank", "value", "fault"),
    [
        (0, float("nan"), "is not finite"),
        (1, float("nan"), "is not finite"),
        (1, 1e20, "has a norm above 1e+19, whose square is no fp32 number"),
    ],
)
def test_a_bad_value_in_one_ranks_part_skips_the_step_on_all(
    bad_rank: int, value: float, fault: str
) -> None:
    def on_a_rank(rank: int) -> list[str]:
        told = []
        for build in SHARDED.values():
            model = model_of(sharded=True)
            optimizer = build(groups_of(model))
            before = train(model, optimizer, range(1))
            backward(model, 1)
            if rank == bad_rank:
                spoil(model, "2.weight", value)
            with pytest.warns(UserWarning, match="at step 2") as caught:
                optimizer.step()
            told += [str(warning.message) for warning in caught]
            assert optimizer.skipped_steps == 1
            assert all(torch.equal(before[key], value) for key, value in whole(model).items())
            after = train(model, optimizer, range(2, 3))
            assert all(value.isfinite().all() for value in after.values())
            assert not torch.equal(before["2.weight"], after["2.weight"])
        return told

    for rank, told in enumerate(run_ranks(on_a_rank)):
        where = "of parameter '2.weight' " + fault + " on rank {}"
        if rank != bad_rank:
            where = "is not finite or too large on another rank; all are usable on rank {}"
        assert len(told) == len(SHARDED)
        assert all(where.format(rank) in message for message in told)


@pytest.mark.parametrize("bad_rank", [0, 1])
def test_ranks_with_other_parameters_skip_together_if_told_so(bad_rank: int) -> None:
    """As the stages of a pipeline: nothing is sharded, and every rank has gradients of its own."""

    def on_a_rank(rank: int) -> list[tuple[bool, int]]:
        found = []
        for build in SHARDED.values():
            model = model_of(sharded=False)
            optimizer = build(groups_of(model))
            optimizer.process_group = distributed.group.WORLD
            before = train(model, optimizer, range(1))
            backward(model, 1)
            if rank == bad_rank:
                spoil(model, "0.bias")
            optimizer.step()
            moved = any(not torch.equal(before[key], value) for key, value in whole(model).items())
            found.append((moved, optimizer.skipped_steps))
        return found

    assert run_ranks(on_a_rank) == [[(False, 1)] * len(SHARDED)] * 2


@pytest.mark.parametrize("bad_rank", [0, 1])
def test_raise_is_on_all_ranks(bad_rank: int) -> None:
    def on_a_rank(rank: int) -> str:
        model = model_of(sharded=True)
        optimizer = Muon(groups_of(model), on_nonfinite="raise")
        backward(model, 0)
        if rank == bad_rank:
            spoil(model, "1.weight")
        with pytest.raises(FloatingPointError, match="Nothing was changed") as error:
            optimizer.step()
        return str(error.value)

    messages = run_ranks(on_a_rank)
    assert f"parameter '1.weight' is not finite on rank {bad_rank}" in messages[bad_rank]
    assert "on another rank" in messages[1 - bad_rank]


@pytest.mark.parametrize(
    ("name", "gathered", "summed"),
    [
        ("Muon-newton_schulz", 1, 0),
        ("Muon-eigh", 1, 0),
        ("GaLoreAdamW-right", 1, 0),  # the basis
        ("GaLoreAdamW-svd", 1, 1),  # of the left side: Adam's direction, and the projected gradient
    ],
)
def test_each_matrix_is_gathered_once_in_a_step(name: str, gathered: int, summed: int) -> None:
    def on_a_rank(rank: int) -> dict[str, int]:
        model = model_of(sharded=True)
        optimizer = SHARDED[name](groups_of(model))
        train(model, optimizer, range(1))  # where a basis is found; the next one is at step 3
        backward(model, 1)
        with CommDebugMode() as sent:
            optimizer.step()
        return {str(op).rsplit(".", 1)[-1]: n for op, n in sent.get_comm_counts().items()}

    for sent in run_ranks(on_a_rank):
        kinds = {
            kind: sum(n for op, n in sent.items() if kind in op) for kind in ("gather", "scatter")
        }
        assert kinds == {"gather": 2 * gathered, "scatter": 2 * summed}
        assert sum(sent.values()) == 2 * (gathered + summed) + 1  # all agree whether to step


def test_galore_holds_a_part_of_all_that_it_keeps() -> None:
    def on_a_rank(rank: int) -> dict[str, tuple[int, ...]]:
        model = model_of(sharded=True)
        optimizer = partial(GALORE, proj_type="full")(groups_of(model))
        train(model, optimizer, range(1))
        state = optimizer.state[model[0].weight]
        return {name: tuple(v.to_local().shape) for name, v in state.items() if name in PARTS}

    first, second = run_ranks(on_a_rank)
    assert first == dict(zip(PARTS, [(2, 3), (2, 3), (17, 3), (6, 3)], strict=True))
    assert second == dict(zip(PARTS, [(1, 3), (1, 3), (16, 3), (6, 3)], strict=True))


def test_galore_without_any_gradient_waits_for_one() -> None:
    """A state of zeros is there, into which torch loads the parts of a checkpoint."""

    def on_a_rank(rank: int) -> None:
        model = model_of(sharded=True)
        optimizer = GALORE(groups_of(model))
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        before = whole(model)
        optimizer.step()
        assert all(torch.equal(before[key], value) for key, value in whole(model).items())
        state = optimizer.state[model[0].weight]
        assert state["step"] == 0
        assert set(state) == {"step", "offset", "exp_avg", "exp_avg_sq", "basis_right"}
        train(model, optimizer, range(1))
        assert state["step"] == 1
        assert state["basis_right"].full_tensor().norm() > 1

    run_ranks(on_a_rank)


def test_what_galore_cannot_do_with_dtensors_is_refused_by_name() -> None:
    def on_a_rank(rank: int) -> None:
        model = model_of(sharded=True)
        rule = r"GaLoreAdamW\(on_rank_change='reproject'\): parameters are DTensors, .* with DDP"
        with pytest.raises(ValueError, match=rule):
            GALORE(groups_of(model), on_rank_change="reproject")
        divided = nn.Linear(12, 8)
        fully_shard(divided, shard_placement_fn=lambda p: Shard(p.ndim - 1))
        rule = r"GaLoreAdamW\(params=.*weight.*\): is a DTensor whose rows are divided"
        with pytest.raises(ValueError, match=rule):
            GALORE(divided.named_parameters())

    run_ranks(on_a_rank)


@pytest.mark.parametrize("name", SHARDED)
def test_raise_changes_nothing_and_survives_a_copy(name: str) -> None:
    model = model_of(sharded=False)
    optimizer = copy.deepcopy(SHARDED[name])(groups_of(model), on_nonfinite="raise")
    before = train(model, optimizer, range(2))
    state = copy.deepcopy(optimizer.state_dict())
    backward(model, 2)
    spoil(model, "0.weight")
    rule = f"{type(optimizer).__name__}: at step 3 the gradient of parameter '0.weight' is not"
    with pytest.raises(FloatingPointError, match=rule):
        optimizer.step()
    assert all(torch.equal(before[key], value) for key, value in whole(model).items())
    after = optimizer.state_dict()
    assert after["param_groups"] == state["param_groups"]
    torch.testing.assert_close(after["state"], state["state"], rtol=0, atol=0)
    twin = copy.deepcopy(optimizer)
    for group, other in zip(twin.param_groups, optimizer.param_groups, strict=True):
        for parameter, source in zip(group["params"], other["params"], strict=True):
            parameter.grad = source.grad
    with pytest.raises(FloatingPointError):
        twin.step()


@pytest.mark.parametrize("build", [Muon, GaLoreAdamW, StableAdamW])
def test_another_answer_to_a_bad_gradient_is_refused(build: Any) -> None:
    rule = rf"{build.__name__}\(on_nonfinite='ignore'\): must be 'skip' or 'raise'"
    with pytest.raises(ValueError, match=rule):
        build(model_of(sharded=False).parameters(), on_nonfinite="ignore")
