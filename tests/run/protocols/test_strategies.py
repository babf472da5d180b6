"""Questions of a strategy: Lightning's have answers, one of a user's own says what it is like."""

from collections.abc import Callable, Collection
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from torch import Tensor, nn

import lightning_align as la
from lightning_align.callbacks.generate_samples import GenerateSamples
from lightning_align.run.protocols import (
    all_ranks_run_model,
    follow_freezing,
    keeps_shapes,
    may_freeze,
    one_rank_runs_model,
    saves_whole_state,
    whole_state_dict,
)
from tests.helpers.answers import Answers, text, trainer_of
from tests.helpers.lisa import Layered, train
from tests.helpers.tiny_models import TINY_MODELS

# Strategy -> may rank 0 run the model, are shapes kept, may blocks freeze, does rank 0 save all
DEFAULTS: list[tuple[Callable[[], Any], tuple[bool, bool, bool, bool]]] = [
    (SingleDeviceStrategy, (True, True, True, True)),
    (DDPStrategy, (True, True, True, True)),
    (lambda: DeepSpeedStrategy.__new__(DeepSpeedStrategy), (False, False, False, False)),
    (FSDPStrategy, (False, False, False, False)),
    (ModelParallelStrategy, (False, True, True, False)),
    (la.PipelineStrategy, (False, True, False, True)),
    (Answers, (False, False, True, False)),
]


@pytest.mark.parametrize(("make", "expected"), DEFAULTS)
def test_what_strategies_are_like(
    make: Callable[[], Any], expected: tuple[bool, bool, bool, bool]
) -> None:
    questions = (one_rank_runs_model, keeps_shapes, may_freeze, saves_whole_state)
    assert tuple(question(make()) for question in questions) == expected


def test_who_cannot_call_the_model_alone_may_do_so_with_all_others() -> None:
    class Together(Answers):
        all_ranks_run_model = True

    strategies = {
        ModelParallelStrategy(): True,
        Together(): True,
        Answers(): False,
        FSDPStrategy(): False,
        DDPStrategy(): False,  # rank 0 can alone
        la.PipelineStrategy(): False,
    }
    assert {each: all_ranks_run_model(each) for each in strategies} == strategies


def test_a_strategy_puts_the_state_together_or_has_it() -> None:
    assert whole_state_dict(SingleDeviceStrategy()) is None
    assert whole_state_dict(Answers()) == {"weight": 1}


def test_states_are_dropped_by_the_strategy_or_from_the_optimizer() -> None:
    kept, dropped = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    for strategy in (SingleDeviceStrategy(), Answers()):
        optimizer = torch.optim.AdamW([kept, dropped])
        (kept + dropped).backward()
        optimizer.step()
        trainer = trainer_of(strategy)
        trainer.strategy.optimizers = [optimizer]
        follow_freezing(trainer, [dropped])
        if isinstance(strategy, Answers):
            assert strategy.dropped == [[dropped]]
            assert optimizer.state.keys() == {kept, dropped}
        else:
            assert optimizer.state.keys() == {kept}


# A strategy of one's own, asked by our callbacks


@pytest.mark.parametrize(
    ("callback", "answer", "message"),
    [
        (
            lambda: GenerateSamples(["a"], max_new_tokens=4),
            "one_rank_runs_model",
            r"under Answers rank zero may not",
        ),
        (lambda: la.OptimizerSwap(torch.optim.SGD), "keeps_shapes", r"Answers flattens parameters"),
        (
            lambda: la.AsyncCheckpoint("x"),
            "saves_whole_state",
            r"its ranks save parts of the state",
        ),
    ],
)
def test_callbacks_refuse_by_what_a_strategy_says(
    callback: Callable[[], Any], answer: str, message: str
) -> None:
    class Says(Answers):
        pass

    Says.__name__ = "Answers"
    trainer = trainer_of(Says())
    module = la.PretrainModule(TINY_MODELS["llama"]())
    with pytest.raises(ValueError, match=message):
        callback().setup(trainer, module, "fit")
    setattr(Says, answer, True)
    trainer.datamodule = text()
    callback().setup(trainer, module, "validate")
    if answer != "saves_whole_state":  # which would open its folder
        callback().setup(trainer, module, "fit")


class Follows(SingleDeviceStrategy):
    """Takes up by itself what LISA freezes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[set[str], set[str]]] = []

    def follow_freezing(self, dropped: Collection[nn.Parameter]) -> None:
        named = list(self.lightning_module.named_parameters())
        for parameter in dropped:
            self.optimizers[0].state.pop(parameter, None)
        frozen = {name for name, parameter in named if not parameter.requires_grad}
        self.calls.append((frozen, {name for name, p in named if p in set(dropped)}))


@pytest.mark.parametrize("state", ["drop", "keep"])
def test_lisa_tells_a_strategy_of_ones_own_what_is_frozen(state: Any) -> None:
    def weights_under(strategy: Strategy) -> tuple[Tensor, la.LISA]:
        module = Layered()
        train(
            module,
            callback := la.LISA(2, interval_steps=3, optimizer_state=state),
            strategy=strategy,
        )
        return nn.utils.parameters_to_vector(module.parameters()), callback

    torch.manual_seed(0)
    ours, callback = weights_under(strategy := Follows())
    torch.manual_seed(0)
    theirs, _ = weights_under(SingleDeviceStrategy())
    assert torch.equal(ours, theirs)
    assert len(strategy.calls) == len(callback.history) == 4
    for (frozen, dropped), (_, active) in zip(strategy.calls, callback.history, strict=True):
        assert {name.split(".")[1] for name in frozen} == {
            str(i) for i in range(4) if i not in active
        }
        assert dropped == (frozen if state == "drop" else set())
