"""Whose parameter is whose, and what is summed, clipped and freed for it; on two ranks."""

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, distributed, nn

from lightning_align.strategies.pipeline.absent import AbsentParameter
from lightning_align.strategies.pipeline.chain import Chain
from lightning_align.strategies.pipeline.ownership import Ownership, move_here
from tests.helpers.ranks import run_ranks

STRETCHES = [(0, 1), (1, 2), (2, 3), (3, 4)]  # two stages on each of two ranks


class Module(pl.LightningModule):
    """Four layers; the last is tied to the first, and two things are in no layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.scale = nn.Parameter(torch.ones(2))
        self.first, self.second = nn.Linear(2, 2, bias=False), nn.Linear(2, 2)
        self.third, self.last = nn.BatchNorm1d(2), nn.Linear(2, 2, bias=False)
        self.last.weight = self.first.weight
        self.register_buffer("seen", torch.zeros(1))


def owned(module: pl.LightningModule | None = None) -> tuple[Any, Ownership]:
    found: Any = module or Module()
    chain = Chain(found, [found.first, found.second, found.third, found.last])
    return found, Ownership(chain, STRETCHES, distributed.group.WORLD)


def test_each_rank_needs_what_its_stages_are_made_of() -> None:
    def ranks(_: int) -> dict[str, list[int]]:
        return owned()[1].ranks

    expected = {
        "scale": [0, 1],  # in no layer: everywhere
        "first.weight": [0, 1],  # tied to the last layer's
        **{f"second.{name}": [1] for name in ("weight", "bias")},
        **{f"third.{name}": [0] for name in ("weight", "bias", "running_mean", "running_var")},
        "third.num_batches_tracked": [0],
        "seen": [1],  # only the last stage runs steps to their end
    }
    assert run_ranks(ranks) == [expected, expected]


def test_tied_parameters_go_by_their_first_name() -> None:
    def names(_: int) -> Any:
        _, ownership = owned()
        tied = ownership.name_of("last.weight"), ownership.names_of("first.weight")
        return *tied, ownership.name_of("nothing.of.ours")

    found = ("first.weight", ["first.weight", "last.weight"], "nothing.of.ours")
    assert run_ranks(names, 1) == [found]


def test_what_others_need_is_left_on_meta_and_stays_tied() -> None:
    def absent(rank: int) -> list[str]:
        module, ownership = owned()
        ownership.leave_others_on_meta()
        assert module.last.weight is module.first.weight
        here = {name for name, p in module.named_parameters() if ownership.is_here(name)}
        move_here(module.double(), torch.device("cpu"))
        for name, parameter in module.named_parameters():
            assert isinstance(parameter, AbsentParameter) is (name not in here)
            assert parameter.is_meta is (name not in here)
        return sorted(name for name, p in module.named_parameters() if p.is_meta)

    assert run_ranks(absent) == [
        ["second.bias", "second.weight"],
        ["third.bias", "third.weight"],
    ]


def test_only_what_is_here_and_empty_is_filled_tied_ones_once() -> None:
    def fill(rank: int) -> list[str]:
        with torch.device("meta"):
            module = Module()
        module, ownership = owned(module)
        reads: list[list[str]] = []

        def read(names: list[str]) -> Tensor:
            reads.append(names)
            return torch.full(module.get_parameter(names[0]).shape, 5.0)

        filled = ownership.fill(read)
        assert module.last.weight is module.first.weight is filled["first.weight"]
        assert module.first.weight.eq(5).all()
        assert ["first.weight", "last.weight"] in reads
        assert len(reads) == len(filled)
        assert ownership.fill(read) == {}
        return sorted(filled)

    everywhere = ["first.weight", "scale"]
    assert run_ranks(fill) == [
        [*everywhere, "third.bias", "third.weight"],
        [*everywhere, "second.bias", "second.weight"],
    ]


def test_shared_parameters_begin_alike_and_their_gradients_add_up() -> None:
    def step(rank: int) -> Any:
        module, ownership = owned()
        with torch.no_grad():
            module.scale.fill_(rank + 3.0)
        ownership.agree_on_shared()
        module.first.weight.grad = torch.full((2, 2), rank + 1.0)
        if rank == 1:  # one rank's stages alone may use it
            module.scale.grad = torch.ones(2)
        module.second.weight.grad = torch.full((2, 2), rank + 1.0)
        ownership.sum_shared_gradients()
        gradients = (module.first.weight, module.scale, module.second.weight)
        return module.scale.tolist(), [p.grad.max().item() for p in gradients]

    first, second = run_ranks(step)
    assert first == ([3.0, 3.0], [3.0, 1.0, 1.0])
    assert second == ([3.0, 3.0], [3.0, 1.0, 2.0])


def test_a_shared_parameter_that_no_rank_uses_keeps_no_gradient() -> None:
    def step(_: int) -> bool:
        module, ownership = owned()
        module.scale.requires_grad_(False)
        ownership.sum_shared_gradients()
        return all(parameter.grad is None for parameter in module.parameters())

    assert run_ranks(step) == [True, True]


def test_the_norm_counts_each_parameter_once_and_clips_as_one_process() -> None:
    """Gradients are those of one process; a rank holds those of its own stages alone."""

    def gradients(module: Module) -> None:
        generator = torch.Generator().manual_seed(2)
        for parameter in module.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)

    whole = Module()
    gradients(whole)
    norm = nn.utils.clip_grad_norm_(whole.parameters(), 0.5)

    def clip(rank: int) -> float:
        module, ownership = owned()
        gradients(module)
        for name, parameter in module.named_parameters():
            if not ownership.is_here(name):
                parameter.grad = None
        total = ownership.total_norm()
        ownership.clip_by_norm(module.parameters(), 0.5)
        for name, parameter in module.named_parameters():
            if ownership.is_here(name):
                torch.testing.assert_close(parameter.grad, whole.get_parameter(name).grad)
        partial = ownership.total_norm([module.scale])
        torch.testing.assert_close(partial, whole.scale.grad.norm())
        return float(total)

    assert run_ranks(clip) == [norm.item()] * 2
