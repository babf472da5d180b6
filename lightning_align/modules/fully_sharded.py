"""Our modules under Lightning's ModelParallelStrategy, which leaves the sharding to the module.

It asks for ``configure_model`` to be overridden. Here that is so in the instance, and only under
this strategy: callbacks that average weights warn of every module that has the hook.
"""

from functools import partial
from typing import TYPE_CHECKING

from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_align._compat.lightning_trainer import all_ranks_for_data
from lightning_align._errors import argument_error
from lightning_align.layers.sharding import check_can_shard, is_sharded, shard
from lightning_align.run.callbacks import callbacks_of
from lightning_align.run.protocols import data_mesh, keeps_shapes, leaves_sharding

if TYPE_CHECKING:
    from lightning_align.modules.causal_lm import CausalLMModule


def prepare(module: "CausalLMModule") -> None:
    """Before a strategy is set up: let it find what it wants of the module, if it wants it."""
    strategy = module.trainer.strategy
    if not isinstance(strategy, ModelParallelStrategy):
        return
    all_ranks_for_data(strategy)
    if not is_overridden("configure_model", module):
        vars(module)["configure_model"] = partial(_shard, module)
    averaging = (WeightAveraging, StochasticWeightAveraging)
    for callback in callbacks_of(module.trainer):
        if isinstance(callback, averaging):
            rule = "it keeps a copy of the module, and a sharded one cannot be copied"
            name = type(callback).__name__
            raise argument_error(
                type(module).__name__, "callbacks", name, rule, "Use strategy='ddp'"
            )


def _shard(module: "CausalLMModule") -> None:
    """``configure_model``: leave each rank a part of all that a step runs."""
    if module._trainer is None or not leaves_sharding(module.trainer.strategy):
        return
    for layers in module.sharded_layers():
        shard(layers, data_mesh(module.trainer.strategy), where=type(module).__name__)


def check(module: "CausalLMModule") -> None:
    """In ``setup``, before anything is sharded.

    Raises:
        ValueError: If the run's strategy lays parameters out as no step of ours can use them.
    """
    where, strategy = type(module).__name__, module.trainer.strategy
    name = type(strategy).__name__
    sharded = "ModelParallelStrategy(data_parallel_size=..., tensor_parallel_size=1)"
    if not keeps_shapes(strategy):
        rule = "it flattens parameters and keeps gradients to itself, and the head's weight and"
        rule += " the gradients of a window are asked for where neither is"
        raise argument_error(where, "strategy", name, rule, f"Use {sharded} or strategy='ddp'")
    if not leaves_sharding(strategy):
        if is_sharded(module.model):
            rule = "the module is sharded, by an earlier run under ModelParallelStrategy"
            way_out = "Go on under that strategy, or build the module anew and load a checkpoint"
            raise argument_error(where, "strategy", name, rule, way_out)
        return
    if data_mesh(strategy).size() < module.trainer.world_size:
        rule = "no layer is divided among ranks that share a batch: each has batches of its own"
        size = module.trainer.world_size // data_mesh(strategy).size()
        raise argument_error(name, "tensor_parallel_size", size, rule, f"Use {sharded}")
    for layers in module.sharded_layers():
        check_can_shard(layers, where)
    within = set(module.model.parameters())
    outside = [name for name, p in module.named_parameters() if p not in within]
    if outside:
        rule = f"ranks sum gradients of parameters in module.model alone; {outside[0]!r} is outside"
        raise argument_error(where, "strategy", name, rule, "Use strategy='ddp'")
