"""What SpikeGuard refuses, before it trains anything."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import LBFGS

from lightning_align._compat.lightning_trainer import unscales
from lightning_align._errors import argument_error
from lightning_align.callbacks.spikes.measures import scaler_of
from lightning_align.layers.sharding import is_cut_for_all
from lightning_align.run.callbacks import callbacks_of
from lightning_align.run.protocols import (
    HoldsGradients,
    SpreadsModel,
    data_mesh,
    has_replicas,
    leaves_sharding,
)


def check_run(trainer: Trainer, module: LightningModule, kind: type[Callback]) -> None:
    """Refuse a run whose steps cannot be judged.

    Raises:
        ValueError: If it has two guards, or the module or the strategy is such.
    """
    guards = sum(isinstance(callback, kind) for callback in callbacks_of(trainer))
    if guards > 1:
        rule = f"the Trainer has {guards} of them, and a step gets one verdict"
        raise argument_error("SpikeGuard", "callbacks", "...", rule, "Leave one of them")
    if not module.automatic_optimization:
        rule = "it optimizes manually, and a verdict falls in Lightning's own steps"
        way_out = "Set automatic_optimization = True, or leave SpikeGuard out"
        raise argument_error("SpikeGuard", "model", type(module).__name__, rule, way_out)
    strategy: Any = trainer.strategy
    if leaves_sharding(strategy):  # whose parameters are looked at once they are sharded
        if data_mesh(strategy).size() < trainer.world_size:
            rule = "it divides layers among ranks that share a batch, and norms are taken over"
            rule += " ranks that each have their own"
            way_out = "Use ModelParallelStrategy(data_parallel_size=..., tensor_parallel_size=1)"
            name = type(strategy).__name__
            raise argument_error("SpikeGuard", "strategy", name, rule, way_out)
    elif not has_replicas(strategy) and not isinstance(strategy, SpreadsModel):
        name = type(strategy).__name__
        rule = "its ranks hold parts of the gradients, and it does not say what their norm is"
        way_out = "Train in one process, or with strategy='ddp', ModelParallelStrategy, a pipeline"
        way_out += " or 'zero_infinity'"
        raise argument_error("SpikeGuard", "strategy", name, rule, way_out)


def check_optimizers(trainer: Trainer) -> None:
    """Refuse optimizers whose gradients are not whole before their step.

    Raises:
        ValueError: If there are several, or if one computes gradients anew within its step, or
            divides them there by the scale of the loss.
    """
    if len(trainer.optimizers) != 1:
        rule = f"the module has {len(trainer.optimizers)}, and a step gets one verdict"
        way_out = "Put all parameters into groups of one"
        raise argument_error("SpikeGuard", "optimizers", "...", rule, way_out)
    optimizer = trainer.optimizers[0]
    name = type(optimizer).__name__
    if isinstance(optimizer, LBFGS):
        rule = "it computes gradients several times in a step, and a step gets one verdict"
        raise argument_error("SpikeGuard", "optimizer", name, rule, "Take one of first order")
    if scaler_of(trainer) is not None and unscales(optimizer):
        rule = "it divides gradients by the scale of the loss within its step, behind the verdict"
        raise argument_error("SpikeGuard", "optimizer", name, rule, "Set fused=False")


def check_parts(trainer: Trainer, module: LightningModule) -> None:
    """Refuse a module that has sharded itself in part, or over some of the ranks.

    Raises:
        ValueError: If a norm over all ranks would count some of its parameters several times.
    """
    if not leaves_sharding(trainer.strategy):
        return
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and not is_cut_for_all(parameter, trainer.world_size):
            rule = f"{name!r} is not cut into parts of which each rank has one, as the others are"
            way_out = "Call fully_shard(self, mesh=device_mesh['data_parallel']) last"
            raise argument_error("SpikeGuard", "model", type(module).__name__, rule, way_out)


def check_agc(trainer: Trainer) -> None:
    """Refuse to clip by unit what is not in memory beside its weight.

    Raises:
        ValueError: If the strategy keeps gradients elsewhere.
    """
    strategy: Any = trainer.strategy
    if isinstance(strategy, HoldsGradients):
        name = type(strategy).__name__
        rule = "it keeps gradients apart from their weights, and agc compares them"
        raise argument_error("SpikeGuard", "strategy", name, rule, "Leave agc out")
