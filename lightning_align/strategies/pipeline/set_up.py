"""The set-up of a pipeline, in 21 steps. Their order matters, and each says why it stands there.

1-3    what all that follows needs            on every rank the whole module
4-6    where the module is cut
7-12   each rank keeps its stages             from here on other ranks' values are gone
13-14  stages that can run                    nothing has an optimizer yet
15-17  training: a rehearsal, the optimizer
18-21  what Lightning and hooks are to see of all stages
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch.optim import Optimizer

from lightning_align.optimizers.safety import AgreesOnSteps
from lightning_align.strategies import launching
from lightning_align.strategies.empty_weights import fill_empty
from lightning_align.strategies.one_optimizer import one_optimizer
from lightning_align.strategies.pipeline import checks
from lightning_align.strategies.pipeline.chain import WHERE, Chain
from lightning_align.strategies.pipeline.cutting import Stretches, cut
from lightning_align.strategies.pipeline.early_gradients import EarlyGradients
from lightning_align.strategies.pipeline.find_chain import find_chain
from lightning_align.strategies.pipeline.layer_costs import count_parameters
from lightning_align.strategies.pipeline.ownership import Ownership
from lightning_align.strategies.pipeline.rehearsal import rehearse
from lightning_align.strategies.pipeline.replay import keep_metrics_here
from lightning_align.strategies.pipeline.runtime import Runtime
from lightning_align.strategies.pipeline.steps import PipelineSteps
from lightning_align.strategies.pipeline.whole_values import WholeValues

if TYPE_CHECKING:
    from lightning_align.strategies.pipeline.strategy import PipelineStrategy


def set_up(strategy: PipelineStrategy, trainer: pl.Trainer) -> None:
    """Cut the module into stages, and make this rank ready to run its own; collective.

    Raises:
        ValueError: If the pipeline cannot train or run the module, on all ranks.
    """
    module, accelerator = strategy.lightning_module, strategy.accelerator
    assert module is not None
    assert accelerator is not None
    # 1. All that follows may use the device.
    accelerator.setup(trainer)
    # 2. What the module alone tells is refused while nothing has been changed.
    checks.check_module(trainer, module)
    # 3. Values (9) and loaders' orders (5, 15) are drawn: on all ranks from one seed.
    launching.agree_on_generators(strategy.root_device)
    group = strategy.device_mesh.get_group("pipeline")
    chain, stretches = _cut(strategy, trainer, module, group)  # 4 to 6
    ownership = _keep_own(strategy, trainer, Ownership(chain, stretches, group))  # 7 to 12
    # 13. The stages, on the device of their parameters.
    options = strategy.schedule, strategy.schedule_csv, group, strategy.root_device
    runtime = Runtime(chain, stretches, *options, record_timeline=strategy.record_timeline)
    strategy._steps = steps = PipelineSteps(chain, runtime)
    strategy._early_gradients = EarlyGradients(module)
    wanted = strategy.num_microbatches
    strategy._first_batches = checks.FirstBatches(trainer, group, strategy.root_device, wanted)
    # 14. Metric objects, before a step is run (15): each rank has all that they count.
    strategy._undo = [keep_metrics_here(module)]
    if trainer.state.fn == TrainerFn.FITTING:
        # 15. What the first batch shows is refused before there is an optimizer, or a step of it.
        rehearse(trainer, steps, wanted, strategy._count_for)
        _set_up_optimizer(strategy, trainer, group)  # 16 and 17
    _see_all_stages(strategy, trainer, module, ownership)  # 18 to 21


def _cut(
    strategy: PipelineStrategy, trainer: pl.Trainer, module: pl.LightningModule, group: Any
) -> tuple[Chain, Stretches]:
    # 4. The chain, while this rank has all layers: the calls of a decoder are found by running it.
    # It intercepts calls, which ``teardown`` ends, whatever fails from here on.
    strategy._chain = chain = find_chain(module)
    # 5. Where to cut it. Layers are timed by running them, so before others' values are gone (8).
    method, stages_per_rank = strategy.partition_method, strategy.num_stages_per_rank
    if method == "profile" and strategy._num_stages > 1:
        costs = strategy._costs.of(trainer, chain, strategy._count_for, group)
    else:
        costs = count_parameters(chain)
    stretches, strategy.table = cut(chain, costs, method, strategy.world_size, stages_per_rank)
    layers = [end - begin for begin, end in stretches]
    arguments = f"schedule={strategy.schedule!r}, partition_method={layers}"
    rank_zero_info(f"{WHERE}({arguments}):\n{strategy.table}")
    # 6. The last refusal that needs no values, while there are those of all stages.
    wanted = strategy.num_microbatches
    checks.check_count(strategy.schedule, len(stretches), strategy.world_size, wanted)
    return chain, stretches


def _keep_own(strategy: PipelineStrategy, trainer: pl.Trainer, ownership: Ownership) -> Ownership:
    # 7. Whose is what; it was found out while tied weights still are one tensor.
    strategy._ownership = ownership
    # 8. Memory is let go of before any is taken: a rank need not have room for the whole model.
    ownership.leave_others_on_meta()
    # 9. Values for what is left and has none; those of a folder that is resumed from come last,
    # where it is known what to read, and in place of all others.
    fill_empty(trainer, ownership, where=WHERE)
    strategy._load_values()
    # 10. The run's precision, of values that were drawn or read in the module's.
    strategy.model = strategy.precision_plugin.convert_module(ownership.module)
    # 11. To the device: only what this rank keeps, and in the precision it is kept in.
    strategy.model_to_device()
    # 12. One value where several ranks hold a parameter; it is sent from the device.
    ownership.agree_on_shared()
    return ownership


def _set_up_optimizer(strategy: PipelineStrategy, trainer: pl.Trainer, group: Any) -> None:
    # 16. An optimizer holds parameters as objects, and (8) to (11) have made new ones.
    with one_optimizer(WHERE):
        strategy.setup_optimizers(trainer)
    checks.check_optimizers(strategy.optimizers)
    # 17. A step that an optimizer of ours skips on one stage, all skip.
    for optimizer in strategy.optimizers:
        if isinstance(optimizer, AgreesOnSteps):
            optimizer.process_group = group


def _see_all_stages(
    strategy: PipelineStrategy, trainer: Any, module: pl.LightningModule, ownership: Ownership
) -> None:
    precision = strategy.precision_plugin
    # 18. Lightning has it behind the optimizers, which a plugin may take hold of.
    strategy.setup_precision_plugin()
    # 19. Its scaler, once it is there.
    checks.agree_on_overflow(precision, ownership.group)

    # 20. Lightning clips by the norm of what a rank holds.
    def clip_by_norm(optimizer: Optimizer, clip_val: float) -> None:
        ownership.clip_by_norm(precision.main_params(optimizer), clip_val)

    vars(precision)["clip_grad_by_norm"] = clip_by_norm
    # 21. Hooks of the user last: they are wrapped, and so is what they may call, such as (20).
    if strategy._num_stages > 1:
        device = strategy.root_device
        values = WholeValues(module, ownership.ranks, strategy._hooks_group, device)
        outside = [(trainer, "save_checkpoint"), (strategy, "total_grad_norm")]
        outside.append((precision, "clip_grad_by_norm"))
        strategy._undo.append(values.lend_to([module, *trainer.callbacks], outside))
