"""The calls of a chain in a run of a step: what breaks its rules is refused, by name."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

from tests.helpers.linear_chain import LINEAR, WIDTH, Foreign, Trains, rows
from tests.helpers.ranks import run_ranks


class ReluBetween(Foreign):
    def output(self, inputs: Tensor) -> Any:
        hidden = self.model.second(self.model.first(inputs).relu())
        return self.model.last(self.model.third(hidden))


class InPlaceBetween(ReluBetween):
    def output(self, inputs: Tensor) -> Any:
        hidden = self.model.first(inputs)
        hidden += 1
        return self.model.last(self.model.third(self.model.second(hidden)))


class Residual(ReluBetween):
    def output(self, inputs: Tensor) -> Any:
        hidden = self.model.first(inputs)
        hidden = hidden + self.model.second(hidden)
        return self.model.last(self.model.third(hidden))


class ResidualAround(ReluBetween):
    """Each layer gets the output before it, and the result gets another, too."""

    def output(self, inputs: Tensor) -> Any:
        hidden = self.model.first(inputs)
        return hidden + self.model.last(self.model.third(self.model.second(hidden)))


class Detached(ReluBetween):
    def output(self, inputs: Tensor) -> Any:
        hidden = self.model.second(self.model.first(inputs))
        return self.model.last(self.model.third(hidden.detach()))


class AuxiliaryLoss(ReluBetween):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        hidden = self.model.first(batch[0])
        output = self.model.last(self.model.third(self.model.second(hidden)))
        return F.mse_loss(output, batch[1]) + 0.1 * hidden[0].abs().mean()


class LogsAnActivation(ReluBetween):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        hidden = self.model.first(batch[0])
        self.log("norm", hidden.norm())
        return F.mse_loss(self.model.last(self.model.third(self.model.second(hidden))), batch[1])


class AsksForAValue(ReluBetween):
    def output(self, inputs: Tensor) -> Any:
        hidden = self.model.first(inputs)
        if hidden.max() > 100:
            raise ArithmeticError
        return self.model.last(self.model.third(self.model.second(hidden)))


class DerivedArgument(ReluBetween):
    class Scaled(nn.Linear):
        def forward(self, hidden: Tensor, scale: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(hidden) * scale

    def make(self) -> None:
        super().make()
        self.model.last = self.Scaled(WIDTH, WIDTH)

    def output(self, inputs: Tensor) -> Any:
        hidden = self.model.first(inputs)
        scale = hidden.detach().abs().mean(-1, keepdim=True)
        hidden = self.model.third(self.model.second(hidden))
        return self.model.last(hidden, scale=scale)


class CalledMoreOftenThanListed(ReluBetween):
    def output(self, inputs: Tensor) -> Any:
        hidden = self.model.second(self.model.first(inputs))
        return self.model.last(self.model.third(self.model.second(hidden)))


class Reentrant(ReluBetween):
    def output(self, inputs: Tensor) -> Any:
        hidden = checkpoint(self.model.second, self.model.first(inputs), use_reentrant=True)
        return self.model.last(self.model.third(hidden))


class CatchesAll(ReluBetween):
    def output(self, inputs: Tensor) -> Any:
        try:
            return self.model(inputs)
        except:  # noqa: E722
            return inputs


class PenaltyOfAll(ReluBetween):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        penalty = sum(parameter.square().sum() for parameter in self.parameters())
        return Foreign.training_step(self, batch, batch_idx) + penalty

    output = Foreign.output


class TiedByHand(ReluBetween):
    def output(self, inputs: Tensor) -> Any:
        return F.linear(self.model(inputs), self.model.first.weight)


class LogsAWeight(ReluBetween):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("weight", self.model.first.weight.norm())
        return Foreign.training_step(self, batch, batch_idx)

    output = Foreign.output


class CompiledPart(ReluBetween):
    def make(self) -> None:
        super().make()
        self.model.second.compile()

    output = Foreign.output


REFUSED = {
    ReluBetween: r"4 layers: its step computes between layer 0 \(Linear\) and layer 1 .* list it",
    InPlaceBetween: r"its step changes what layer 0 \(Linear\) has returned in place",
    Residual: r"its step computes between layer 1 \(Linear\) and layer 2 \(Linear\)",
    ResidualAround: r"what .* depends on the output of layer 0 \(Linear\), and only the last",
    Detached: r"its step computes between layer 1 \(Linear\) and layer 2 \(Linear\)",
    AuxiliaryLoss: r"what the step returns depends on the output of layer 0 \(Linear\), and only",
    LogsAnActivation: r"what is logged as 'norm' depends on the output of layer 0 \(Linear\)",
    AsksForAValue: r"a value that the step asks for in Python depends on the output of layer 0",
    DerivedArgument: r"layer 3 \(Scaled\) is given something that was computed from layer 0",
    CalledMoreOftenThanListed: r"calls layer 1 \(Linear\) again\. List it as often as it is called",
    Reentrant: r"recomputes layer 1 \(Linear\) with use_reentrant=True\. Use .*_reentrant=False",
    CatchesAll: r"its step catches every exception, .* Catch Exception, not BaseException",
    PenaltyOfAll: r"add is given a weight of another stage, whose values are on another rank",
    TiedByHand: r"linear is given a weight of another stage, whose values are on another rank",
    LogsAWeight: r"what is logged as 'weight' is made of weights of another stage, whose",
    CompiledPart: r"its part 'model.second' is compiled\. Pass the module from before torch.comp",
}
CASES = [(kind, "fit") for kind in REFUSED]
CASES += [(ReluBetween, "validate"), (TiedByHand, "validate"), (TiedByHand, "predict")]
CASES += [(ResidualAround, "predict"), (Detached, "test")]


@pytest.mark.parametrize(("kind", "mode"), CASES)
def test_refused_at_set_up_on_all_ranks(kind: type[Foreign], mode: str) -> None:

    def refused(rank: int) -> None:
        with LINEAR.setting(rank) as (trainer, _):
            trainer.callbacks.append(Trains())
            module = kind()
            with pytest.raises(Exception, match=REFUSED[kind]) as told:
                getattr(trainer, mode)(module, module.loader())
            assert "PipelineStrategy(" in str(told.value)
            theirs = dict(kind().named_parameters())
            for name, parameter in module.named_parameters():
                assert parameter.is_meta or torch.equal(parameter, theirs[name])

    run_ranks(refused)


class Dropping(Foreign):
    """One layer drops out, and may be recomputed for backward."""

    recomputes = False

    def make(self) -> None:
        super().make()
        self.model.third = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.5))

    def output(self, inputs: Tensor) -> Any:
        hidden = self.model.second(self.model.first(inputs))
        if self.recomputes:
            hidden = checkpoint(self.model.third, hidden, use_reentrant=False)
        else:
            hidden = self.model.third(hidden)
        return self.model.last(hidden)


def test_a_layer_that_is_recomputed_drops_out_the_same_on_any_number_of_ranks() -> None:
    class Recomputing(Dropping):
        recomputes = True

    def losses(make: Callable[[], Any], ranks: int) -> Any:
        def fit(rank: int) -> Any:
            pl.seed_everything(1, verbose=False)
            with LINEAR.setting(rank, ranks) as (trainer, seen):
                trainer.fit(make(), rows())
            return seen.losses

        return run_ranks(fit, ranks)[0]

    expected = losses(Dropping, 2)
    assert losses(Recomputing, 2) == expected
    assert losses(Recomputing, 1) == losses(Dropping, 1) == expected
