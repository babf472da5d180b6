"""OptimizerSwap: named groups and any optimizer under a LightningModule that is not ours."""

import logging
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.tuner import Tuner
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    MultiStepLR,
    OneCycleLR,
    PolynomialLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)
from transformers import GPT2LMHeadModel

from lightning_align import Muon, OptimizerSwap, PretrainModule
from lightning_align.cli.app import AlignCLI
from tests.helpers.ranks import ForkedRanks, run_ranks
from tests.laws.members import HandWritten
from tests.modules.test_pretrain import fit, gpt2, llama, rows

BATCHES = [rows(0, 1), rows(2, 3), rows(4, 5)]


class Wrapped(pl.LightningModule):
    """GPT-2, wrapped by hand; ``configured`` is what its ``configure_optimizers`` returns."""

    def __init__(self, configured: Any = None) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.network = GPT2LMHeadModel(gpt2())
        self.configured = configured or (lambda optimizer: optimizer)

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self.network(**batch).loss

    def configure_optimizers(self) -> Any:
        return self.configured(torch.optim.SGD(self.parameters(), lr=0.1))


def groups_of(trainer: Any) -> dict[str, Any]:
    (optimizer,) = trainer.optimizers
    return {group["name"]: group for group in optimizer.param_groups}


def swap(**options: Any) -> OptimizerSwap:
    return OptimizerSwap(partial(Muon, lr=0.02, adamw_lr=3e-3), **options)


def test_hand_wrapped_gpt2_trains_with_muon_and_named_groups() -> None:
    module = Wrapped()
    trainer = fit(module, BATCHES, callbacks=[swap()])
    assert isinstance(trainer.optimizers[0], Muon)
    groups = groups_of(trainer)
    assert groups["matrices_transposed"]["lr"] == 0.02
    assert groups["matrices_transposed"]["transposed"] is True
    assert groups["embeddings"]["lr"] == 3e-3
    assert groups["embeddings"]["weight_decay"] == 0.0
    assert "network.transformer.wte.weight" in groups["embeddings"]["param_names"]
    state = trainer.optimizers[0].state
    assert "momentum_buffer" in state[module.network.transformer.h[0].attn.c_attn.weight]
    assert "exp_avg" in state[module.network.transformer.wte.weight]


def test_it_trains_as_if_the_module_had_built_the_optimizer_itself() -> None:
    from lightning_align import build_param_groups

    class Own(Wrapped):
        def configure_optimizers(self) -> Any:
            return Muon(build_param_groups(self), lr=0.02, adamw_lr=3e-3)

    own, swapped = Own(), Wrapped()
    fit(own, BATCHES)
    fit(swapped, BATCHES, callbacks=[swap()])
    assert all(map(torch.equal, own.parameters(), swapped.parameters()))


def test_hand_written_module_is_sorted_by_types_with_a_warning() -> None:
    module = HandWritten()
    with pytest.warns(UserWarning, match=r"'head.weight'\] is taken for the head"):
        trainer = fit(module, BATCHES, callbacks=[swap()])
    assert groups_of(trainer)["matrices"]["param_names"] == ["body.0.weight"]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="build_param_groups")
        fit(module, BATCHES, callbacks=[swap(adamw_patterns=["head.*"])])


def test_our_module_gets_its_own_groups() -> None:
    trainer = fit(PretrainModule(llama()), BATCHES, callbacks=[swap()])
    ours = PretrainModule(llama()).parameter_groups()
    names = {group["name"]: [name for name, _ in group["params"]] for group in ours}
    assert {name: g["param_names"] for name, g in groups_of(trainer).items()} == names


def test_table_is_printed(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        fit(Wrapped(), BATCHES, callbacks=[swap()])
    table = next(record.message for record in caplog.records if "OptimizerSwap" in record.message)
    assert "matrices_transposed  yes" in table


def test_module_is_as_before_when_fit_has_ended() -> None:
    module = Wrapped()
    fit(module, BATCHES, callbacks=[swap()])
    assert "configure_optimizers" not in vars(module)
    assert isinstance(module.configure_optimizers(), torch.optim.SGD)


# Schedulers


SCHEDULERS: list[Any] = [
    lambda o: ConstantLR(o, factor=0.5, total_iters=4),
    lambda o: CosineAnnealingLR(o, T_max=6),
    lambda o: CosineAnnealingWarmRestarts(o, T_0=3, T_mult=2),
    lambda o: ExponentialLR(o, gamma=0.9),
    lambda o: LambdaLR(o, lambda step: 1 / (1 + step)),
    lambda o: LinearLR(o, start_factor=0.2, end_factor=0.7, total_iters=5),
    lambda o: MultiStepLR(o, milestones=[2, 4, 4], gamma=0.5),
    lambda o: PolynomialLR(o, total_iters=6, power=2.0),
    lambda o: StepLR(o, step_size=2, gamma=0.3),
    lambda o: SequentialLR(
        o, [LinearLR(o, 0.1, total_iters=3), CosineAnnealingLR(o, T_max=5)], milestones=[3]
    ),
]


class Rates(pl.Callback):
    def __init__(self) -> None:
        self.seen: list[list[float]] = []

    def on_before_zero_grad(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        self.seen.append([group["lr"] for group in optimizer.param_groups])


@pytest.mark.parametrize("build", SCHEDULERS)
def test_scheduler_of_the_module_moves_all_groups_in_proportion(build: Any) -> None:
    def configured(optimizer: Any) -> Any:
        schedule = {"scheduler": build(optimizer), "interval": "step", "frequency": 1}
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    theirs, ours = Rates(), Rates()
    fit(Wrapped(configured), BATCHES * 2, callbacks=[theirs])
    fit(Wrapped(configured), BATCHES * 2, callbacks=[swap(), ours])
    fractions = [rates[0] / 0.1 for rates in theirs.seen]
    assert len(set(fractions)) > 1
    assert [rates[0] / 0.02 for rates in ours.seen] == pytest.approx(fractions)
    assert [rates[1] / 3e-3 for rates in ours.seen] == pytest.approx(fractions)


@pytest.mark.parametrize(
    "shape",
    [
        lambda o, s: ([o], [s]),
        lambda o, s: ([o], [{"scheduler": s, "interval": "epoch"}]),
        lambda o, s: {"optimizer": o, "lr_scheduler": s},
        lambda o, s: [{"optimizer": o, "lr_scheduler": {"scheduler": s}}],
    ],
)
def test_every_form_of_configure_optimizers_is_read(shape: Any) -> None:
    """Lightning steps a scheduler without an interval after each epoch."""
    module = Wrapped(lambda optimizer: shape(optimizer, ExponentialLR(optimizer, 0.5)))
    trainer = fit(module, BATCHES, callbacks=[swap()], max_epochs=2)
    assert groups_of(trainer)["embeddings"]["lr"] == pytest.approx(3e-3 / 4)


def test_scheduler_of_the_callback_goes_before_the_modules() -> None:
    module = Wrapped(lambda o: {"optimizer": o, "lr_scheduler": ReduceLROnPlateau(o)})
    halving = partial(StepLR, step_size=1, gamma=0.5)
    trainer = fit(module, BATCHES, callbacks=[swap(lr_scheduler=halving)])
    assert groups_of(trainer)["embeddings"]["lr"] == pytest.approx(3e-3 / 8)


def test_scheduler_that_loses_the_ratio_is_warned_of() -> None:
    module = Wrapped(lambda o: ([o], [CosineAnnealingLR(o, 5, eta_min=1e-3)]))
    with pytest.warns(UserWarning, match="ratio is lost"):
        fit(module, BATCHES, callbacks=[swap()])


# Refusals


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (lambda o: ReduceLROnPlateau(o), "ReduceLROnPlateau"),
        (lambda o: OneCycleLR(o, max_lr=0.1, total_steps=9), "OneCycleLR"),
        (lambda o: SequentialLR(o, [LinearLR(o), OneCycleLR(o, 0.1, 9)], [3]), "OneCycleLR"),
    ],
)
def test_scheduler_that_cannot_be_built_anew_is_refused(build: Any, name: str) -> None:
    module = Wrapped(lambda o: ([o], [{"scheduler": build(o), "monitor": "loss"}]))
    match = rf"OptimizerSwap\(lr_scheduler=None\): the module's {name} was made.*Pass the scheduler"
    with pytest.raises(ValueError, match=match):
        fit(module, BATCHES, callbacks=[swap()])


def test_lambdas_for_each_group_are_refused() -> None:
    class Grouped(Wrapped):
        def configure_optimizers(self) -> Any:
            first, *rest = self.parameters()
            optimizer = torch.optim.SGD([{"params": [first]}, {"params": rest}], lr=0.1)
            return [optimizer], [LambdaLR(optimizer, [lambda _: 1.0, lambda _: 0.5])]

    with pytest.raises(ValueError, match="LambdaLR was made for its own optimizer"):
        fit(Grouped(), BATCHES, callbacks=[swap()])


def test_several_optimizers_are_refused() -> None:
    module = Wrapped(lambda o: [o, torch.optim.SGD(o.param_groups[0]["params"][:1], lr=0.1)])
    with pytest.raises(ValueError, match=r"Wrapped.configure_optimizers returns 2 and must return"):
        fit(module, BATCHES, callbacks=[swap()])


@pytest.mark.parametrize("strategy", [FSDPStrategy, DeepSpeedStrategy])
def test_strategies_that_flatten_parameters_are_refused_by_name(strategy: Any) -> None:
    trainer = pl.Trainer(accelerator="cpu", logger=False)
    trainer.strategy.__class__ = strategy  # Lightning builds them on GPUs only
    rule = rf"OptimizerSwap\(.*{strategy.__name__} flattens parameters.*'ddp'"
    with pytest.raises(ValueError, match=rule):
        swap().setup(trainer, Wrapped(), "fit")


def test_fsdp2_trains_as_one_process_does() -> None:
    class Sharded(Wrapped):
        def configure_model(self) -> None:
            for block in self.network.transformer.h:
                fully_shard(block)
            fully_shard(self.network)

    def on_a_rank(rank: int) -> dict[str, torch.Tensor]:
        module = Sharded()
        trainer = fit(
            module,
            BATCHES,
            callbacks=[swap()],
            devices=2,
            use_distributed_sampler=False,  # both ranks see what one process sees
            strategy=ModelParallelStrategy(),
            plugins=[ForkedRanks(rank, 2)],
        )
        assert isinstance(trainer.optimizers[0], Muon)
        state = trainer.optimizers[0].state
        weight = module.network.transformer.h[0].attn.c_attn.weight
        assert isinstance(state[weight]["momentum_buffer"], DTensor)
        return {name: p.full_tensor().detach() for name, p in module.named_parameters()}

    one = Wrapped()
    fit(one, BATCHES, callbacks=[swap()])
    for many in run_ranks(on_a_rank):
        for name, parameter in one.named_parameters():
            torch.testing.assert_close(many[name], parameter.detach(), rtol=0, atol=1e-5)


def test_patterns_without_a_match_are_refused() -> None:
    module = Wrapped()
    with pytest.raises(ValueError, match="adamw_patterns='nothing'"):
        fit(module, BATCHES, callbacks=[swap(adamw_patterns=["nothing"])])


# YAML


def test_yaml_builds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run.yaml").write_text(
        """
trainer:
  accelerator: cpu
  max_epochs: 1
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  callbacks:
    - class_path: OptimizerSwap
      init_args:
        optimizer: {class_path: lightning_align.Muon, init_args: {lr: 0.02, adamw_lr: 0.003}}
        adamw_patterns: ["head.*"]
model: {class_path: tests.laws.members.HandWritten}
data: {class_path: tests.helpers.resume.SequenceData}
"""
    )
    monkeypatch.chdir(tmp_path)
    cli = AlignCLI(args=["fit", "--config", "run.yaml"])
    groups = groups_of(cli.trainer)
    assert isinstance(cli.trainer.optimizers[0], Muon)
    assert (groups["matrices"]["lr"], groups["head"]["lr"]) == (0.02, 0.003)


# One optimizer, and its rate


def test_two_of_them_are_refused() -> None:
    with pytest.raises(ValueError, match=r"OptimizerSwap\(optimizer=.*\): the Trainer has 2, and"):
        fit(Wrapped(), BATCHES, callbacks=[swap(), OptimizerSwap(torch.optim.SGD)])


class WithRate(Wrapped):
    def __init__(self, name: str = "lr") -> None:
        super().__init__()
        setattr(self, name, 0.5)


@pytest.mark.parametrize("name", ["learning_rate", pytest.param("mine", marks=pytest.mark.slow)])
def test_the_rate_that_lr_find_has_found_is_the_optimizers(tmp_path: Path, name: str) -> None:
    """Whatever it was before is not: the optimizer has a rate of its own."""
    module = WithRate(name)
    options: dict[str, Any] = {"attr_name": "mine"} if name == "mine" else {}
    trainer = pl.Trainer(callbacks=[OptimizerSwap(partial(Muon, lr=0.02))], **quiet(tmp_path))
    loader = torch.utils.data.DataLoader(BATCHES * 6, batch_size=None)
    for _ in range(2):  # as a cell of a notebook that is run again
        finder = Tuner(trainer).lr_find(module, loader, num_training=16, max_lr=0.1, **options)
    trainer.fit(module, loader)
    assert finder is not None
    found = finder.suggestion()
    assert found != 0.02
    assert {group["lr"] for group in groups_of(trainer).values()} == {found}


def test_a_rate_that_nobody_has_looked_for_stays_unread(tmp_path: Path) -> None:
    trainer = pl.Trainer(callbacks=[OptimizerSwap(partial(Muon, lr=0.02))], **quiet(tmp_path))
    trainer.fit(WithRate(), torch.utils.data.DataLoader(BATCHES, batch_size=None))
    assert {group["lr"] for group in groups_of(trainer).values()} == {0.02}


def test_lr_find_is_refused_for_groups_of_several_rates(tmp_path: Path) -> None:
    trainer = pl.Trainer(callbacks=[swap()], **quiet(tmp_path))
    loader = torch.utils.data.DataLoader(BATCHES * 6, batch_size=None)
    message = r"OptimizerSwap\(optimizer=.*\): lr_find tries one .* Muon have \[0.02, 0.003\]. B"
    with pytest.raises(ValueError, match=message):
        Tuner(trainer).lr_find(WithRate(), loader)


def quiet(folder: Path) -> dict[str, Any]:
    return {
        "max_steps": 2,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
    }
