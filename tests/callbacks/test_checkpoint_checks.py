"""What AsyncCheckpoint refuses."""

from datetime import timedelta
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, SingleDeviceStrategy

from lightning_align.callbacks.checkpoint_checks import check, check_strategy, check_triggers


def test_a_value_is_refused_unless_something_holds() -> None:
    check("mode", "min", True, "must be 'min' or 'max'")
    with pytest.raises(ValueError, match=r"^AsyncCheckpoint\(mode='x'\): must be y\. Say y\.$"):
        check("mode", "x", False, "must be y", "Say y")


@pytest.mark.parametrize(
    ("triggers", "message"),
    [
        (
            (2, timedelta(minutes=1), None),
            r"every_n_train_steps=2\): .* with train_time_interval",
        ),
        ((2, None, 1), r"every_n_train_steps=2\): cannot be combined with every_n_epochs\. Add a"),
        ((0, timedelta(1), 3), r"train_time_interval=.*\): cannot be combined with every_n_epochs"),
        ((None, timedelta(0), 1), r"train_time_interval=.*\): cannot be combined with every_n"),
        ((-1, None, None), r"every_n_train_steps=-1\): must not be negative"),
        ((None, timedelta(-1), None), r"train_time_interval=.*\): must not be negative"),
        ((1, None, -1), r"every_n_epochs=-1\): must not be negative"),
    ],
)
def test_negative_triggers_and_two_at_once_are_refused(triggers: Any, message: str) -> None:
    with pytest.raises(ValueError, match=r"AsyncCheckpoint\(" + message):
        check_triggers(*triggers)


@pytest.mark.parametrize(
    "triggers", [(None, None, None), (1, None, None), (0, timedelta(1), 0), (0, None, 2)]
)
def test_one_trigger_or_none_is_taken_and_0_is_none(triggers: Any) -> None:
    check_triggers(*triggers)


class Spread(SingleDeviceStrategy):
    """Writes its checkpoints by itself."""

    saves_whole_state = True

    def save_checkpoint(self, *_: Any, **__: Any) -> None:
        raise NotImplementedError


def test_strategies_that_shard_are_refused_unless_they_say_that_they_do_not() -> None:
    with pytest.raises(ValueError, match=r"strategy='FSDPStrategy'\): its ranks save parts of"):
        check_strategy(FSDPStrategy())
    strategy = Spread(torch.device("cpu"))
    check_strategy(strategy)
    strategy.saves_whole_state = False
    with pytest.raises(ValueError, match=r"strategy='Spread'\): .*save_distributed_checkpoint=F"):
        check_strategy(strategy)
    check_strategy(DDPStrategy())


def test_other_writers_are_refused() -> None:
    strategy = SingleDeviceStrategy("cpu", checkpoint_io=AsyncCheckpointIO())
    with pytest.raises(ValueError, match=r"plugins='AsyncCheckpointIO'\): would be passed over"):
        check_strategy(strategy)
