"""What a pipeline cannot train is refused before it trains, with a way out."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_align import LISA, DPOModule
from tests.helpers.pipelines import Batches, Chained, Run
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny_models import TINY_MODELS
from tests.laws.members import HandWritten

RUN = Run("chain", {"schedule": "1F1B", "num_microbatches": 4}, steps=2, data={"masked": False})


class Manual(Chained):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class TwoOptimizers(Chained):
    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), 0.1) for part in (self.embedding, self.blocks)]


class PassesOnAList(Chained):
    class Listing(nn.Module):
        def forward(self, hidden: Tensor) -> list[Any]:
            return [hidden, "a word"]

    def __init__(self) -> None:
        super().__init__()
        self.listing = self.Listing()

    def pipeline_layers(self) -> list[nn.Module]:
        return [self.embedding, self.listing, *self.blocks, self.head]


class FailsOnShapes(Chained):
    class Failing(nn.Module):
        def forward(self, hidden: Tensor) -> Tensor:
            raise ArithmeticError("at once")

    def pipeline_layers(self) -> list[nn.Module]:
        return [self.embedding, self.Failing(), *self.blocks, self.head]


class ReturnsNone(Chained):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        super().training_step(batch, batch_idx)


class SkipsBatches(Chained):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return loss if loss > 1e9 else None


class ReturnsMore(Chained):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return {"loss": super().training_step(batch, batch_idx), "extra": 1}


class CallsTwice(Chained):
    def loss(self, batch: Any) -> Tensor:
        return super().loss(batch) + super().loss(batch)


class NeverCalls(Chained):
    def forward(self, tokens: Tensor) -> Tensor:
        raise AssertionError

    def loss(self, batch: Any) -> Tensor:
        return self.head(self.embedding(batch["input_ids"])).mean()


class LogsATensor(Chained):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("losses", torch.stack([loss, loss]))
        return loss


class WipesGradients(Chained):
    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        for parameter in self.parameters():
            parameter.grad = None


class PropagatesBack(Chained):
    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        (2 * loss).backward()


class RatesOfItsOwn(pl.Callback):
    """A learning rate that follows the rank."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        trainer.optimizers[0].param_groups[0]["lr"] *= 1 + trainer.global_rank


class EmptyChain(Chained):
    def pipeline_layers(self) -> list[nn.Module]:
        return []


def dpo() -> pl.LightningModule:
    return DPOModule(TINY_MODELS["llama"]())


CHAINED: Callable[[], pl.LightningModule] = Chained
REFUSED: dict[str, tuple[Callable[[], pl.LightningModule], dict[str, Any], str]] = {
    "fewer layers than stages": (
        partial(Chained, num_blocks=1),
        {"strategy": {"schedule": "Interleaved1F1B"}},
        r"\(num_stages_per_rank=4\): 4 stages need a layer each, and the chain has 3\. Use fewer",
    ),
    "no chain": (
        HandWritten,
        {},
        r"\(model='HandWritten'\): cannot tell the chain of layers .* Define pipeline_layers",
    ),
    "empty chain": (EmptyChain, {}, r"its pipeline_layers\(\) must return modules"),
    "stages times replicas": (
        CHAINED,
        {"strategy": {"pipeline_parallel_size": 4}},
        r"\(pipeline_parallel_size=4\): with one data-parallel replica it must be the world size",
    ),
    "fewer micro-batches than stages": (
        CHAINED,
        {"strategy": {"num_microbatches": 1}},
        r"\(num_microbatches=1\): 1F1B needs at least as many .* stages, 2\. Use schedule='GPipe'",
    ),
    "micro-batches and rounds": (
        CHAINED,
        {"strategy": {"schedule": "Interleaved1F1B", "num_microbatches": 5}},
        r"\(num_microbatches=5\): Interleaved1F1B needs a multiple of 2 micro-batches\. Use 4",
    ),
    "indivisible batch": (
        CHAINED,
        {"strategy": {"num_microbatches": 3}},
        r"\(num_microbatches=3\): batches of 8 rows cannot be cut .* Use 2, or another batch_size",
    ),
    "wrong partition": (
        CHAINED,
        {"strategy": {"partition_method": [1, 1]}},
        r"\(partition_method=\[1, 1\]\): must be 2 numbers of layers, .* with the sum 6",
    ),
    "manual optimization": (
        Manual,
        {},
        r"\(model='Manual'\): it optimizes manually, .* Use automatic optimization",
    ),
    "several optimizers": (
        TwoOptimizers,
        {},
        r"the module must have one optimizer, and has several\. Put all parameters into groups",
    ),
    "LBFGS": (
        partial(Chained, optimizer=torch.optim.LBFGS),
        {},
        r"\(optimizers='LBFGS'\): it evaluates the loss several times .* Use another optimizer",
    ),
    "non-tensor outputs": (
        PassesOnAList,
        {"strategy": {"partition_method": [2, 5]}},
        r"\(model='PassesOnAList'\): stage 0 must hand on tensors only, and returned str\. Let",
    ),
    "a stage fails on the first batch": (FailsOnShapes, {}, r"stage 0: ArithmeticError: at once"),
    "training_step returns None": (
        ReturnsNone,
        {},
        r"ReturnsNone\(training_step='...'\): must return its loss.* no return with a val",
    ),
    "training_step returns None at times": (
        SkipsBatches,
        {},
        r"SkipsBatches\(training_step='...'\): must return its loss.* returned NoneType\. Use",
    ),
    "training_step returns more": (
        ReturnsMore,
        {},
        r"must return its loss, .* and returned a dict of \['extra', 'loss'\]\. Use self.log",
    ),
    "the chain is called twice": (
        CallsTwice,
        {},
        r"a step must call each of them once, and calls layer 0 \(Embedding\) again",
    ),
    "the chain is not called": (
        NeverCalls,
        {},
        r"in their order, and calls layer 5 \(Linear\) where layer 1 \(CausalBlock\) is due\. List",
    ),
    "a tensor is logged": (
        LogsATensor,
        {},
        r"LogsATensor.log\(name='losses'\): must be a number under a pipeline, and is a Tensor",
    ),
    "gradients are wiped": (WipesGradients, {}, r"must zero gradients through optimizer.zero_grad"),
    "own backward": (
        PropagatesBack,
        {},
        r"\(model='PropagatesBack'\): it overrides backward, .* Change gradients in on_after_back",
    ),
    "stages with different learning rates": (
        CHAINED,
        {"callbacks": [RatesOfItsOwn]},
        r"\(optimizer='AdamW'\): stages must train with the same .*'lr' of group 0 is 0.003 to",
    ),
    "a reference": (
        dpo,
        {},
        r"\(model='DPOModule'\): its reference would have to run beside it.*precompute_ref_log_pro",
    ),
    "LISA": (
        CHAINED,
        {"callbacks": [LISA]},
        r"LISA\(strategy='PipelineStrategy'\): it does not follow .* Train in one process",
    ),
}


# What only the step itself shows; all else is told at set-up, before there is an optimizer.
IN_THE_FIRST_STEP = (
    "stages with different learning rates",
    "a stage fails on the first batch",
    "training_step returns None at times",
    "training_step returns more",
    "a tensor is logged",
    "gradients are wiped",
)


class Reached(pl.Callback):
    """What a run has come to."""

    def __init__(self, allowed: int = 0) -> None:
        self.hooks: list[str] = []
        self.allowed = allowed

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.hooks.append("after set-up")

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        self.hooks.append("first step")

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        assert trainer.global_step < self.allowed, "nothing must be trained"


def refuses(run: Run, make: Callable[[], pl.LightningModule], rank: int, message: str) -> list[str]:
    """Fit, and be refused with the weights as they were; returns what was reached."""
    with run.setting(rank) as (trainer, _):
        trainer.callbacks.append(reached := Reached())
        torch.manual_seed(0)
        theirs = dict(make().named_parameters())
        torch.manual_seed(0)
        module = make()
        with pytest.raises(Exception, match=message):
            trainer.fit(module, run.loader())
        assert trainer.global_step == 0
        ours = {name: p for name, p in module.named_parameters() if not p.is_meta}
        assert ours
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    return reached.hooks


@pytest.mark.parametrize("name", REFUSED)
def test_refused_on_every_rank(name: str) -> None:
    make, options, message = REFUSED[name]
    strategy = {**RUN.strategy, **options.get("strategy", {})}  # type: ignore[dict-item]
    run = replace(RUN, **{**options, "strategy": strategy})

    reached = run_ranks(lambda rank: refuses(run, make, rank, message), timeout_s=40)
    expected = ["after set-up", "first step"] if name in IN_THE_FIRST_STEP else []
    assert reached == [expected, expected]


class Stream(IterableDataset[dict[str, Tensor]]):
    """Batches that come once; those of rank 1 are others from the third on, or from the first."""

    def __init__(self, rank: int, other_from: int) -> None:
        batches = Batches(4, masked=False).batches
        for number in range(other_from, 4):
            batches[number]["labels"] = batches[number]["labels"] + rank
        self.batches = iter(batches)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return self.batches


OTHER_BATCHES: dict[str, tuple[Callable[[int], DataLoader[Any]], list[str], int]] = {
    "told at set-up": (
        lambda rank: DataLoader(Batches(4, masked=False, shifted=rank), batch_size=None),
        [],
        0,
    ),
    "a stream, told in the first step": (
        lambda rank: DataLoader(Stream(rank, 0), batch_size=None),
        ["after set-up", "first step"],
        0,
    ),
    "later on, told in that step": (
        lambda rank: DataLoader(Stream(rank, 2), batch_size=None),
        ["after set-up", *["first step"] * 3],
        2,
    ),
}


@pytest.mark.parametrize("case", OTHER_BATCHES)
def test_ranks_with_different_batches_are_refused(case: str) -> None:
    make_loader, expected, steps = OTHER_BATCHES[case]

    def refused(rank: int) -> list[str]:
        with RUN.setting(rank) as (trainer, _):
            trainer.callbacks.append(reached := Reached(allowed=steps))
            module, theirs = Chained(), dict(Chained().named_parameters())
            message = r"\(batch='...'\): all ranks must have the same batch, .*\[1\] have .* Call s"
            with pytest.raises(ValueError, match=message):
                trainer.fit(module, make_loader(rank))
            assert trainer.global_step == steps
            ours = {name: p for name, p in module.named_parameters() if not p.is_meta}
            assert all(torch.equal(p, theirs[name]) for name, p in ours.items()) is (steps == 0)
        return reached.hooks

    assert run_ranks(refused) == [expected, expected]


def test_a_batch_that_cannot_be_cut_is_refused_in_a_resumed_run_too(tmp_path: Path) -> None:
    path = str(tmp_path / "end.ckpt")

    def save(rank: int) -> None:
        with RUN.setting(rank) as (trainer, _):
            trainer.fit(Chained(), RUN.loader())
            trainer.save_checkpoint(path)

    def refused(rank: int) -> None:
        strategy = {"schedule": "GPipe", "num_microbatches": 3}
        run = replace(RUN, strategy=strategy, trainer={"max_epochs": 2})
        with (
            run.setting(rank) as (trainer, _),
            pytest.raises(ValueError, match="batches of 8 rows cannot be cut into as many"),
        ):
            trainer.fit(Chained(), run.loader(), ckpt_path=path)

    run_ranks(save)
    run_ranks(refused)
