"""What a rank keeps of a module that was built without weights gets its values, or is refused."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, distributed, nn

from lightning_align.models.weights import parameters_on_meta, remember_weights
from lightning_align.strategies.empty_weights import fill_empty
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny_models import TINY_MODELS


class Whole(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.here, self.there = nn.Linear(2, 3), nn.Linear(2, 3)


class Kept:
    """Keeps what ``here`` names, and notes how it was filled."""

    def __init__(self, module: nn.Module, here: str = "here") -> None:
        self.module, self.group = module, distributed.group.WORLD
        self._here = here
        self.reads: list[Callable[[list[str]], Tensor] | None] = []

    def is_here(self, name: str) -> bool:
        return name.startswith(self._here)

    def fill(self, read: Callable[[list[str]], Tensor] | None) -> dict[str, nn.Parameter]:
        self.reads.append(read)
        filled = {}
        for name, parameter in [*self.module.named_parameters()]:
            if self.is_here(name):
                value = torch.full(parameter.shape, torch.nan) if read is None else read([name])
                holder, _, attribute = name.rpartition(".")
                filled[name] = nn.Parameter(value)
                setattr(self.module.get_submodule(holder), attribute, filled[name])
        return filled


def trainer(fn: TrainerFn = TrainerFn.FITTING, ckpt_path: str | None = None) -> Any:
    return SimpleNamespace(ckpt_path=ckpt_path, state=SimpleNamespace(fn=fn))


def built(empty: bool = True) -> Whole:
    with torch.device("meta" if empty else "cpu"):
        return Whole()


def test_what_is_kept_is_drawn_and_the_rest_stays_empty() -> None:
    def fill(_: int) -> tuple[bool, bool]:
        kept = Kept(built())
        fill_empty(trainer(), kept, where="Test")
        drawn = [parameter.isfinite().all() for parameter in kept.module.here.parameters()]
        return all(drawn), all(parameter.is_meta for parameter in kept.module.there.parameters())

    assert run_ranks(fill, 1) == [(True, True)]


@pytest.mark.parametrize("empty", [True, False])
def test_where_nothing_that_is_kept_is_empty_nothing_is_filled(empty: bool) -> None:
    def fill(_: int) -> list[Any]:
        kept = Kept(built(empty), here="nowhere" if empty else "here")
        fill_empty(trainer(), kept, where="Test")
        return kept.reads

    assert run_ranks(fill, 1) == [[]]


def test_a_checkpoint_brings_the_values_so_that_nothing_is_drawn() -> None:
    def fill(_: int) -> bool:
        kept = Kept(built())
        fill_empty(trainer(TrainerFn.VALIDATING, "a.ckpt"), kept, where="Test")
        return kept.reads == [None] and bool(kept.module.here.weight.isnan().all())

    assert run_ranks(fill, 1) == [True]


def test_values_are_read_from_the_folder_that_the_model_is_from(tmp_path: Path) -> None:
    whole = TINY_MODELS["llama"]()
    whole.save_pretrained(tmp_path)
    with parameters_on_meta():
        model = TINY_MODELS["llama"]()
    remember_weights(model, str(tmp_path), "main")

    def fill(_: int) -> bool:
        kept = Kept(model, here="lm_head")
        fill_empty(trainer(TrainerFn.VALIDATING), kept, where="Test")
        return torch.equal(model.lm_head.weight, whole.lm_head.weight)

    assert run_ranks(fill, 1) == [True]


def test_one_rank_that_has_no_values_is_refused_on_both() -> None:
    """Rank 1 keeps what is not empty, and would wait for rank 0 in the next collective."""

    def refused(rank: int) -> None:
        kept = Kept(built(), here="here" if rank == 0 else "nowhere")
        with pytest.raises(ValueError, match=r"Test\(model='Whole'\): its parameters are on .*"):
            fill_empty(trainer(TrainerFn.VALIDATING), kept, where="Test")

    run_ranks(refused)


def test_an_empty_buffer_is_refused_whatever_brings_the_parameters() -> None:
    def refused(_: int) -> None:
        kept = Kept(built())
        kept.module.here.register_buffer("scale", torch.ones(1, device="meta"))
        for given in (trainer(), trainer(ckpt_path="a.ckpt")):
            with pytest.raises(ValueError, match=r"its buffer 'here.scale' is on the meta device"):
                fill_empty(given, kept, where="Test")

    run_ranks(refused, 1)
