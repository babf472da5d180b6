"""What a pipeline cannot train is refused before it trains, with a way out."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from lightning_align import DPOModule, PipelineStrategy
from tests.helpers.pipelines import Batches, Chained, Run
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny_models import TINY_MODELS, VOCAB_SIZE
from tests.laws.members import HandWritten

RUN = Run("chain", {"schedule": "1F1B", "num_microbatches": 4}, steps=2, data={"masked": False})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"schedule": "1f1b"}, r"\(schedule='1f1b'\): must be one of \['GPipe', '1F1B', 'Inter"),
        ({"num_microbatches": 0}, r"\(num_microbatches=0\): must be at least 1"),
        ({"num_stages_per_rank": 0}, r"\(num_stages_per_rank=0\): must be at least 1"),
        (
            {"partition_method": "profile"},
            r"\(partition_method='profile'\): .* the strategy measures none\. Use 'parameters'",
        ),
        (
            {"num_stages_per_rank": 2},
            r"\(num_stages_per_rank=2\): 1F1B has one stage .* Use schedule='Interleaved1F1B'",
        ),
        (
            {"schedule": "Interleaved1F1B", "num_stages_per_rank": 1},
            r"Interleaved1F1B needs at least 2 stages on each rank\. Use schedule='1F1B'",
        ),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PipelineStrategy(**arguments)


class Manual(Chained):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class TwoOptimizers(Chained):
    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), 0.1) for part in (self.embedding, self.blocks)]


class OutsideTheChain(Chained):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))


class PassesOnAList(Chained):
    class Listing(nn.Module):
        def forward(self, hidden: Tensor) -> list[Any]:
            return [hidden, "a word"]

    def pipeline_layers(self) -> list[nn.Module]:
        return [self.embedding, self.Listing(), *self.blocks, self.head]


class FailsOnShapes(Chained):
    class Failing(nn.Module):
        def forward(self, hidden: Tensor) -> Tensor:
            raise ArithmeticError("at once")

    def pipeline_layers(self) -> list[nn.Module]:
        return [self.embedding, self.Failing(), *self.blocks, self.head]


class ReturnsNone(Chained):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        super().training_step(batch, batch_idx)


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


class EmptyChain(Chained):
    def pipeline_layers(self) -> list[nn.Module]:
        return []


class LISA(pl.Callback):
    """Any callback of that name."""


def dpo() -> pl.LightningModule:
    return DPOModule(TINY_MODELS["llama"]())


CHAINED: Callable[[], pl.LightningModule] = Chained
REFUSED: dict[str, tuple[Callable[[], pl.LightningModule], dict[str, Any], str]] = {
    "fewer layers than stages": (
        partial(Chained, num_blocks=1),
        {"strategy": {"schedule": "Interleaved1F1B"}},
        r"\(num_stages_per_rank=4\): 4 stages need a layer each, and the chain has 3\. Use fewer",
    ),
    "parameters outside the chain": (
        OutsideTheChain,
        {},
        r"\(model='OutsideTheChain'\): 1 parameter\(s\) are in no layer .* first 'scale': no stage",
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
        r"ReturnsNone\(training_step='...'\): must return its loss.* and returned NoneType\. Use",
    ),
    "training_step returns more": (
        ReturnsMore,
        {},
        r"must return its loss, .* and returned a dict of \['extra', 'loss'\]\. Use self.log",
    ),
    "the chain is called twice": (
        CallsTwice,
        {},
        r"its chain is self\(\.\.\.\): the step must call it once, not 2 times",
    ),
    "the chain is not called": (
        NeverCalls,
        {},
        r"its chain is self\(\.\.\.\): the step must call it once\. Call the chain",
    ),
    "a tensor is logged": (
        LogsATensor,
        {},
        r"LogsATensor.log\(name='losses'\): must be a number under a pipeline, and is a Tensor",
    ),
    "gradients are wiped": (WipesGradients, {}, r"must zero gradients through optimizer.zero_grad"),
    "pairs": (dpo, {}, r"\(model='DPOModule'\): its rows are pairs, .* Use another strategy"),
    "LISA": (
        CHAINED,
        {"callbacks": [LISA]},
        r"\(callbacks='LISA'\): it needs the whole model, and a rank .* Leave the callback out",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_on_every_rank(name: str) -> None:
    make, options, message = REFUSED[name]
    strategy = {**RUN.strategy, **options.get("strategy", {})}  # type: ignore[dict-item]
    run = replace(RUN, **{**options, "strategy": strategy})

    def refused(rank: int) -> None:
        with run.setting(rank) as (trainer, _), pytest.raises(Exception, match=message):
            trainer.fit(make(), run.loader())

    run_ranks(refused, timeout_s=40, group=True)


def test_ranks_with_different_batches_are_refused() -> None:
    def refused(rank: int) -> None:
        with RUN.setting(rank) as (trainer, _):
            data = Batches(2, masked=False)
            data.batches[0]["labels"] += rank
            loader = torch.utils.data.DataLoader(data, batch_size=None)
            with pytest.raises(
                ValueError, match=r"all ranks must have the same batch, .* rank\(s\) \[1\] have"
            ):
                trainer.fit(Chained(), loader)

    run_ranks(refused)


def test_tokens_without_rows_are_refused() -> None:
    from lightning_align.strategies.microbatches import batch_rows

    with pytest.raises(ValueError, match="must have one first dimension"):
        batch_rows({"a": torch.zeros(2), "b": torch.zeros(3, VOCAB_SIZE)})
