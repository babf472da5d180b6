"""What is asked of a strategy, with the answers of Lightning's own."""

from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch import strategies
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    ModelParallelStrategy,
    Strategy,
)
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from typing_extensions import Protocol, runtime_checkable

from lightning_align._compat.lightning_trainer import wrap_in_ddp_again, writes_one_file
from lightning_align.layers import sharding


@runtime_checkable
class SpreadsModel(Protocol):
    """Its ranks hold parts of one model, whose parameters may be on meta until its set-up."""

    def total_grad_norm(self) -> Tensor:
        """Norm of the gradients of all parts; collective."""


@runtime_checkable
class HoldsGradients(Protocol):
    """It takes gradients out of ``p.grad`` as soon as they are there."""

    def scale_gradients(self, factor: Tensor, /) -> None:
        """Multiply all gradients of the open window."""

    def waiting_gradients(self) -> dict[str, Tensor]:
        """Copies of those that wait for their step, by name."""

    def put_gradients(self, gradients: Mapping[str, Tensor], /) -> set[str]:
        """Let gradients wait in the place of those that do; names of those that are taken."""


@runtime_checkable
class SnapshotsOwnPart(Protocol):
    """Each rank can take, and put back in mid-fit, what is its own of model and optimizer."""

    def snapshot_state(self) -> dict[str, Any]:
        """That part, under ``state_dict`` and ``optimizer_states``; not copied, nothing is sent."""

    def restore_state(self, state: Mapping[str, Any], /) -> None:
        """Put it back, on the rank that has taken it."""


@runtime_checkable
class SaysWhatStateTakes(Protocol):
    """A state that is held in mid-fit takes other memory than its tensors have, or none."""

    def state_nbytes(self) -> Mapping[str, int]:
        """Most bytes that one takes on this rank, by folder; "" is host memory."""


@runtime_checkable
class TellsWaits(Protocol):
    """Its steps wait for something beside their device: a drive, or other ranks."""

    @property
    def waited_s(self) -> float:
        """Seconds that this rank has waited so far."""


@runtime_checkable
class TellsCommits(Protocol):
    """It keeps each step on a drive, which takes time beside what waits for transfers."""

    @property
    def committing_s(self) -> float:
        """Seconds that this rank has spent so, so far, without waits."""


@runtime_checkable
class TellsBackward(Protocol):
    """Its training step runs backward, too."""

    @property
    def backward_s(self) -> float:
        """Seconds that backward has taken so far on this rank."""


@runtime_checkable
class GathersState(Protocol):
    """It has to put the state of the module together."""

    def whole_state_dict(self) -> dict[str, Any]:
        """That state on rank 0, empty elsewhere; collective."""


@runtime_checkable
class SaysWhoSaves(Protocol):
    """It says whether rank 0 has the whole state when a checkpoint is written, or each its part."""

    @property
    def saves_whole_state(self) -> bool:
        """Whether rank 0 has it."""


@runtime_checkable
class SaysWhoRuns(Protocol):
    """It says whether rank 0 can call the model while the others wait."""

    @property
    def one_rank_runs_model(self) -> bool:
        """Whether it can."""


@runtime_checkable
class RunsModelTogether(Protocol):
    """Its ranks hold parts of a model, whose layers are whole where all ranks call them."""

    @property
    def all_ranks_run_model(self) -> bool:
        """Whether all of them can call the model at once, each on rows of its own."""


@runtime_checkable
class SaysHowParametersLie(Protocol):
    """It says whether optimizers get parameters in the shapes that the module gave them."""

    @property
    def keeps_shapes(self) -> bool:
        """Whether they do."""


@runtime_checkable
class FollowsFreezing(Protocol):
    """Parameters may be frozen and released between its steps."""

    def follow_freezing(self, dropped: Collection[nn.Parameter], /) -> None:
        """Take up what requires a gradient now, and forget the optimizer's state of ``dropped``."""


@runtime_checkable
class GathersParameters(Protocol):
    """Parameters are in memory only while a module is called, or while they are asked for."""

    def gathered(
        self, parameters: Collection[str | nn.Parameter] | None = None, *, modify: bool = False
    ) -> AbstractContextManager[None]:
        """Around code that reads parameters, or edits them: some, or all for None; collective."""


@runtime_checkable
class LetsGo(Protocol):
    """It holds memory for the parameters of modules that it has set up."""

    def let_go(self, parameters: Collection[nn.Parameter], /) -> None:
        """Give that up for some of a frozen module, which nobody will run again."""


# Questions


def saves_whole_state(strategy: Strategy) -> bool:
    """Whether rank 0 alone writes a checkpoint, of the whole state."""
    if isinstance(strategy, SaysWhoSaves):
        return strategy.saves_whole_state
    if isinstance(strategy, ModelParallelStrategy):
        return writes_one_file(strategy)
    return type(strategy).save_checkpoint is Strategy.save_checkpoint


def whole_state_dict(strategy: Strategy) -> dict[str, Any] | None:
    """The module's state from a strategy that has to put it together; collective."""
    if isinstance(strategy, ModelParallelStrategy) and strategy.model is not None:
        return sharding.whole_state(strategy.model)
    return strategy.whole_state_dict() if isinstance(strategy, GathersState) else None


def leaves_sharding(strategy: Strategy) -> bool:
    """Whether a module is to shard itself in ``configure_model``."""
    return isinstance(strategy, ModelParallelStrategy)


def data_mesh(strategy: Strategy) -> DeviceMesh:
    """The ranks among which a module is to shard itself, each with batches of its own."""
    assert isinstance(strategy, ModelParallelStrategy)
    return strategy.device_mesh["data_parallel"]


def one_rank_runs_model(strategy: Strategy) -> bool:
    """Whether rank 0 can call the model while the others wait."""
    if isinstance(strategy, SaysWhoRuns):
        return strategy.one_rank_runs_model
    return has_replicas(strategy)


def all_ranks_run_model(strategy: Strategy) -> bool:
    """Whether no rank can call the model alone, and all can at once: each calls it as often."""
    if one_rank_runs_model(strategy):
        return False
    if isinstance(strategy, RunsModelTogether):
        return strategy.all_ranks_run_model
    return isinstance(strategy, ModelParallelStrategy)


def keeps_shapes(strategy: Strategy) -> bool:
    """Whether optimizers get parameters in the shapes that the module gave them."""
    if isinstance(strategy, SaysHowParametersLie):
        return strategy.keeps_shapes
    return not isinstance(strategy, (DeepSpeedStrategy, strategies.FSDPStrategy))


def gathered(
    strategy: Strategy, parameters: Collection[nn.Parameter], *, modify: bool = False
) -> AbstractContextManager[None]:
    """Around code that reads or edits the values of parameters, wherever they are."""
    if isinstance(strategy, GathersParameters):
        return strategy.gathered(parameters, modify=modify)
    return nullcontext()


def let_go(strategy: Strategy, parameters: Collection[nn.Parameter]) -> None:
    """Let a strategy give up what it holds for parameters that nobody will use again."""
    if isinstance(strategy, LetsGo):
        strategy.let_go(parameters)


def may_freeze(strategy: Strategy) -> bool:
    """Whether parameters may be frozen and released between steps."""
    return isinstance(strategy, (FollowsFreezing, ModelParallelStrategy)) or has_replicas(strategy)


def follow_freezing(trainer: pl.Trainer, dropped: Collection[nn.Parameter]) -> None:
    """Let strategy and optimizer take up what requires a gradient now; see ``FollowsFreezing``."""
    strategy = trainer.strategy
    if isinstance(strategy, FollowsFreezing):
        strategy.follow_freezing(dropped)
        return
    for optimizer in trainer.optimizers:
        for parameter in dropped:
            optimizer.state.pop(parameter, None)
    if isinstance(strategy, DDPStrategy):
        wrap_in_ddp_again(strategy, trainer.lightning_module)
    elif leaves_sharding(strategy):
        sharding.follow_freezing(trainer.lightning_module)


def restores_in_fit(strategy: Strategy) -> bool:
    """Whether each rank has all of a state, or a part to itself, and can put it back in mid-fit."""
    own_part = isinstance(strategy, SnapshotsOwnPart) or leaves_sharding(strategy)
    return own_part or has_replicas(strategy)


def has_replicas(strategy: Strategy) -> bool:
    """Whether each rank has all of the model, where the module keeps it."""
    has = isinstance(strategy, (strategies.SingleDeviceStrategy, DDPStrategy))
    return has and not isinstance(strategy, DeepSpeedStrategy)  # a DDPStrategy by inheritance
