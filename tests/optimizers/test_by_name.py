"""An optimizer by its name is the one of YAML, and what is none is refused where it is given."""

from functools import partial
from typing import Any

import pytest
import torch
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, StepLR

from lightning_align import Muon, OptimizerSwap, PretrainModule
from lightning_align.optimizers.by_name import optimizer_builder, scheduler_builder
from tests.modules.test_pretrain import fit, llama, rows


def parameters() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.ones(2, 2))]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("AdamW", torch.optim.AdamW),
        ("torch.optim.Adam", torch.optim.Adam),
        ("Muon", Muon),
        ("torch.optim.Muon", torch.optim.Muon),
        ("lightning_align.Muon", Muon),
        (SGD, SGD),
        (partial(SGD, lr=0.5), SGD),
        ({"class_path": "SGD"}, SGD),
    ],
    ids=str,
)
def test_a_name_is_its_class(name: Any, kind: type) -> None:
    assert type(optimizer_builder("Here", name)(parameters())) is kind


def test_what_init_args_say_is_passed_on() -> None:
    named = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.25}}
    optimizer = optimizer_builder("Here", named)(parameters())
    assert optimizer.param_groups[0]["lr"] == 0.25
    named = {"class_path": "CosineAnnealingLR", "init_args": {"T_max": 7}}
    assert scheduler_builder("Here", named)(optimizer).T_max == 7
    assert optimizer_builder("Here", None) is scheduler_builder("Here", None) is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (SGD(parameters(), 0.1), r"optimizer='<SGD>'\): is built already.*partial\(SGD, lr=\.\.\."),
        (3, r"optimizer=3\): must be what builds the Optimizer"),
        ("AdamV", r"optimizer='AdamV'\): there is no Optimizer of that name\. Did you mean Adam"),
        ("no.such.Adam", r"there is no Optimizer of that name\. Did you mean Adam"),
        ("torch.nn.Linear", "there is no Optimizer of that name"),
        ({"name": "SGD"}, "must be what builds the Optimizer"),
        (partial(SGD, lrr=1), r"optimizer\.lrr=1\): SGD has no such argument\. Did you mean lr\."),
        (partial(Muon, momentun=1), r"optimizer\.momentun=1\): Muon has no such argument\. Did"),
        (torch.nn.Linear, "Linear is no Optimizer"),
        (partial(torch.nn.Linear, 3), "Linear is no Optimizer"),
        ({"class_path": "SGD", "init_args": {"x": 1}}, r"optimizer\.x=1\): SGD has no such arg"),
    ],
)
def test_what_is_none_is_refused(given: Any, message: str) -> None:
    for use in (partial(optimizer_builder, "Here"), OptimizerSwap, lambda o: module(o)):
        with pytest.raises(ValueError, match=message):
            use(given)


def module(optimizer: Any, **options: Any) -> PretrainModule:
    return PretrainModule(llama(), optimizer=optimizer, **options)


def test_a_built_scheduler_is_refused() -> None:
    built = StepLR(SGD(parameters(), 0.1), 1)
    assert isinstance(built, LRScheduler)
    with pytest.raises(ValueError, match=r"PretrainModule\(lr_scheduler='<StepLR>'\): is built"):
        module(None, lr_scheduler=built)


@pytest.mark.parametrize("given", ["CosineAnnealingLR", CosineAnnealingLR])
def test_a_scheduler_says_what_it_needs(given: Any) -> None:
    message = r"lr_scheduler='CosineAnnealingLR'\): it needs T_max\. Pass functools\.partial\(Cos"
    with pytest.raises(ValueError, match=message):
        scheduler_builder("Here", given)
    assert scheduler_builder("Here", partial(CosineAnnealingLR, T_max=3)) is not None


def test_what_is_built_must_be_an_optimizer() -> None:
    with pytest.raises(ValueError, match=r"PretrainModule\(optimizer=.*and returned NoneType\."):
        fit(module(lambda groups: None), [rows(0, 1)])


def test_a_run_trains_with_what_was_named() -> None:
    named = module("SGD", lr_scheduler={"class_path": "StepLR", "init_args": {"step_size": 1}})
    trainer = fit(named, [rows(0, 1)])
    assert type(trainer.optimizers[0]) is SGD
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-4)
    assert CosineAnnealingLR is not type(trainer.lr_scheduler_configs[0].scheduler)
