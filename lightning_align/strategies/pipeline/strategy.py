"""Pipeline parallelism: the layers of a model on several devices, the batch in micro-batches.

torch.distributed.pipelining has the schedules and sends the tensors; what it leaves open is here:
where an ordinary LightningModule is cut, one loss and one log on all ranks, gradient accumulation,
clipping, tied weights, changing shapes, checkpoints, and failures that end every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.optim import Optimizer
from typing_extensions import override

from lightning_align._compat import lightning_trainer
from lightning_align._errors import argument_error
from lightning_align.models.weights import parameters_on_meta
from lightning_align.optimizers.safety import AgreesOnSteps
from lightning_align.pipelining import Event, partition, partition_table
from lightning_align.strategies import failure, launching
from lightning_align.strategies.empty_weights import fill_empty
from lightning_align.strategies.pipeline import whole_state
from lightning_align.strategies.pipeline.chain import WHERE, Chain
from lightning_align.strategies.pipeline.checkpoints import StageCheckpoints
from lightning_align.strategies.pipeline.checks import (
    agree_on_overflow,
    check_arguments,
    check_batch,
    check_count,
    check_module,
    check_optimizers,
    check_settings,
    one_optimizer,
)
from lightning_align.strategies.pipeline.find_chain import find_chain
from lightning_align.strategies.pipeline.layer_costs import (
    LayerCosts,
    count_parameters,
    time_layers,
)
from lightning_align.strategies.pipeline.microbatches import batch_rows, count_that_divides
from lightning_align.strategies.pipeline.ownership import Ownership, move_here
from lightning_align.strategies.pipeline.rehearsal import rehearse
from lightning_align.strategies.pipeline.replay import keep_metrics_here
from lightning_align.strategies.pipeline.runtime import Runtime
from lightning_align.strategies.pipeline.steps import PipelineSteps
from lightning_align.strategies.pipeline.whole_values import WholeValues, own_group

_CHECKED_BATCHES = 3  # of each loop, that all ranks have the same


class PipelineStrategy(StageCheckpoints):
    """Train an ordinary LightningModule with its layers spread over several processes.

    The batch of a step is cut into micro-batches, which follow each other through the stages. Every
    rank loads the same batch and runs the module's own step on each micro-batch, up to the end of
    its stage; what the last stage logs is logged on every rank. The chain of layers is what the
    step calls: the blocks of a ``PretrainModule`` or of one language model of transformers, the
    layers of one ``nn.Sequential`` that holds all parameters, or what ``pipeline_layers()`` of the
    module returns (and ``pipeline_inputs(batch)``, if the first is to be called with something
    else than its step passes on). Each layer must get what the one before it returned, and only the
    last one's output may go on. A loss that is a mean is averaged over micro-batches, weighted by
    ``pipeline_microbatch_weight(batch)`` if the module has it; one that is a sum
    (``loss_reduction = "sum"`` on the module) is added up.

    Args:
        schedule: ``"GPipe"``, ``"1F1B"`` or ``"Interleaved1F1B"``.
        num_microbatches: Micro-batches of a batch; None takes the most, up to four for each stage,
            that the batch can be cut into.
        num_stages_per_rank: Stages on each rank; None means 1, and 2 for an interleaved schedule.
        pipeline_parallel_size: Ranks of the pipeline; ``"auto"`` means all.
        partition_method: ``"parameters"`` balances the stages' parameters, ``"profile"`` their
            time, measured on the first micro-batch, ``"uniform"`` their layers,
            ``"type:<regex>"`` the layers whose class matches; a list is the number of layers of
            each stage.
        schedule_csv: File with the actions of every rank in torch's format, in place of
            ``schedule``.
        record_timeline: Whether to note when each action of a training batch runs, for
            ``timeline()``; an accelerator is then waited for after each.
        save_distributed_checkpoint: Whether a checkpoint is a folder into which each rank writes
            its own stages, and not a file put together on rank 0. Either is resumed from.
        timeout: How long a rank waits for its peers before all end.
        process_group_backend: torch's name of the backend; None chooses by device.
        start_method: How processes are started where they are not there yet: ``"popen"``,
            ``"spawn"``, ``"fork"`` or ``"forkserver"``.
        empty_init: Whether the command line, ``configure_model`` and ``trainer.init_module`` build
            models without memory for parameters; each rank then loads or draws those that it keeps.

    Attributes:
        table: The stages with their layers and parameters, as printed at set-up.
        schedule_in_use: The schedule of the latest training batch; a batch with too few
            micro-batches for ``schedule`` runs under another.

    Raises:
        ValueError: If a value is out of its range.

    Example:
        >>> strategy = PipelineStrategy(schedule="1F1B", num_microbatches=8)

    Note: manual optimization, several optimizers, LBFGS and callbacks that freeze or thaw layers
    are refused at set-up.
    """

    strategy_name = "pipeline"

    def __init__(
        self,
        schedule: str = "1F1B",
        num_microbatches: int | None = None,
        num_stages_per_rank: int | None = None,
        pipeline_parallel_size: int | Literal["auto"] = "auto",
        partition_method: str | list[int] = "parameters",
        schedule_csv: str | None = None,
        record_timeline: bool = False,
        save_distributed_checkpoint: bool = False,
        timeout: timedelta = timedelta(minutes=10),
        process_group_backend: str | None = None,
        start_method: Literal["popen", "spawn", "fork", "forkserver"] = "popen",
        empty_init: bool = False,
    ) -> None:
        super().__init__()
        several = check_arguments(schedule, num_microbatches, num_stages_per_rank)
        self.schedule = schedule
        self.num_microbatches = num_microbatches
        self.num_stages_per_rank = num_stages_per_rank or (2 if several else 1)
        self.pipeline_parallel_size = pipeline_parallel_size
        self.partition_method = partition_method
        self.schedule_csv = schedule_csv
        self.record_timeline = record_timeline
        self.save_distributed_checkpoint = save_distributed_checkpoint
        self.timeout = timeout
        self.process_group_backend = process_group_backend
        self.start_method = start_method
        self.empty_init = empty_init
        self.num_nodes = 1
        self.table = ""
        self.schedule_in_use = schedule
        self._chain: Chain | None = None
        self._steps: PipelineSteps | None = None
        self._timed: tuple[pl.LightningModule, LayerCosts] | None = None
        self._timeline: list[Event] = []
        self._gradients = 0
        self._checked: dict[str, int] = {}
        self._undo: list[Callable[[], None]] = []

    # Processes

    @property
    @override
    def root_device(self) -> torch.device:
        assert self.parallel_devices is not None
        return self.parallel_devices[self.local_rank]

    @property
    def num_processes(self) -> int:
        """Processes on this node."""
        return len(self.parallel_devices or [])

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        # Parts of one model see the same samples.
        return {"num_replicas": 1, "rank": 0}

    @override
    def _configure_launcher(self) -> None:
        self._launcher = launching.launcher(self)

    @override
    def setup_environment(self) -> None:
        super().setup_environment()
        launching.join_ranks(self)
        size = self.pipeline_parallel_size
        if size not in ("auto", self.world_size):
            rule = f"with one data-parallel replica it must be the world size, {self.world_size}"
            way_out = "Leave it at 'auto', or set devices to it"
            raise argument_error(WHERE, "pipeline_parallel_size", size, rule, way_out)
        names = ("data_parallel", "pipeline")
        shape = (1, self.world_size)
        self.device_mesh = init_device_mesh(self.root_device.type, shape, mesh_dim_names=names)
        assert self.lightning_module is not None
        self.lightning_module._device_mesh = self.device_mesh
        self._hooks_group = own_group()

    # Set-up

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        module, accelerator = self.lightning_module, self.accelerator
        assert module is not None
        assert accelerator is not None
        accelerator.setup(trainer)
        check_module(trainer, module)
        launching.agree_on_generators(self.root_device)
        group = self.device_mesh.get_group("pipeline")
        chain = find_chain(module)
        stretches = self._cut(chain, self._costs(trainer, chain, group))
        check_count(self.schedule, len(stretches), self.world_size, self.num_microbatches)
        self._chain = chain
        self._parameters = Ownership(chain, stretches, group)
        self._parameters.leave_others_on_meta()
        fill_empty(trainer, self._parameters, where=WHERE)
        self._load_values()
        self.model = self.precision_plugin.convert_module(module)
        self.model_to_device()
        self._parameters.agree_on_shared()
        runtime = Runtime(
            chain,
            stretches,
            self.schedule,
            self.schedule_csv,
            group,
            self.root_device,
            record_timeline=self.record_timeline,
        )
        self._steps = PipelineSteps(chain, runtime)
        self._undo = [keep_metrics_here(module)]
        self._checked.clear()
        if trainer.state.fn == TrainerFn.FITTING:
            rehearse(trainer, self._steps, self.num_microbatches, self._count_for)
            with one_optimizer():
                self.setup_optimizers(trainer)
            check_optimizers(self.optimizers)
            for optimizer in self.optimizers:
                if isinstance(optimizer, AgreesOnSteps):  # a step that one stage skips, all skip
                    optimizer.process_group = group
        self.setup_precision_plugin()
        agree_on_overflow(self.precision_plugin, group)
        # Lightning clips by the norm of what a rank holds.
        vars(self.precision_plugin)["clip_grad_by_norm"] = self._clip_by_norm
        if self._num_stages > 1:
            self._see_whole_values(trainer, module)

    @contextmanager
    @override
    def tensor_init_context(self, empty_init: bool | None = None) -> Iterator[None]:
        empty = self.empty_init if empty_init is None else empty_init
        device = parameters_on_meta() if empty else self.root_device
        with device, self.precision_plugin.tensor_init_context():
            yield

    def _costs(self, trainer: pl.Trainer, chain: Chain, group: Any) -> LayerCosts:
        """What the layers cost by ``partition_method``; times only where there is training."""
        if self.partition_method != "profile" or self._num_stages == 1:
            return count_parameters(chain)
        if self._timed is None or self._timed[0] is not chain.module:
            if trainer.state.fn != TrainerFn.FITTING:
                return count_parameters(chain)
            # Kept: a module that has been cut is cut there again.
            self._timed = chain.module, time_layers(trainer, chain, self._count_for, group)
        return self._timed[1]

    def _cut(self, chain: Chain, costs: LayerCosts) -> list[tuple[int, int]]:
        ends = {"first_cost": costs.first, "last_cost": costs.last}
        stretches = partition(
            costs.layers,
            self._num_stages,
            self.partition_method,
            type_names=[type(layer).__name__ for layer in chain.layers],
            where=WHERE,
            stages_argument="num_stages_per_rank" if self.num_stages_per_rank > 1 else "devices",
            **ends,
        )
        self.table = partition_table(
            stretches, costs.layers, num_ranks=self.world_size, unit=costs.unit, **ends
        )
        layers = [end - begin for begin, end in stretches]
        told = f"{WHERE}(schedule={self.schedule!r}, partition_method={layers})"
        rank_zero_info(f"{told}:\n{self.table}")
        return stretches

    @override
    def model_to_device(self) -> None:
        assert self.model is not None
        device = self.root_device
        move_here(self.model, device)

    # Steps

    @property
    def _num_stages(self) -> int:
        return self.world_size * self.num_stages_per_rank

    def _count_for(self, batch: Any) -> int:
        wanted = self.num_microbatches or (1 if self._num_stages == 1 else 4 * self._num_stages)
        return count_that_divides(batch_rows(batch), wanted)

    def _check_batch(self, loop: str, batch: Any) -> None:
        """The first batches of a loop: the same on all ranks, and to be cut as asked for."""
        assert self._steps is not None
        checked = self._checked.get(loop, 0)
        if checked < _CHECKED_BATCHES:
            self._checked[loop] = checked + 1
            self._steps.check_same(batch)
        if loop == "train" and checked == 0:
            trainer = self.lightning_module.trainer  # type: ignore[union-attr]
            check_batch(trainer, batch_rows(batch), self.num_microbatches)

    @override
    def training_step(self, batch: Any, *rest: Any, **kwargs: Any) -> Tensor:
        assert self._steps is not None
        assert self._parameters is not None
        module = self.lightning_module
        assert module is not None
        trainer: Any = module.trainer
        self._check_batch("train", batch)
        window = trainer.accumulate_grad_batches
        if trainer.fit_loop.epoch_loop.batch_idx % window == 0:
            # Lightning zeroes gradients after training_step, when the schedule has made new ones.
            for parameter in module.parameters():
                parameter.grad = None
        scaler = getattr(self.precision_plugin, "scaler", None)
        loss = self._steps.train(
            batch,
            (*rest, *kwargs.values()),
            self._count_for(batch),
            context=self.precision_plugin.train_step_context,
            factor=1 / window,
            scale=scaler.scale if scaler is not None else lambda value: value,
        )
        self.schedule_in_use = self._steps.runtime.schedule_in_use
        self._timeline = self._steps.runtime.timeline
        if not lightning_trainer.is_accumulating(trainer):
            self._parameters.sum_shared_gradients()
        self._gradients = sum(p.grad is not None for p in module.parameters())
        for optimizer in self.optimizers:
            vars(optimizer)["zero_grad"] = _nothing  # until backward
        return loss

    @override
    def backward(
        self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """The hooks around backward; the schedule has done the work."""
        module = self.lightning_module
        assert module is not None
        for muted in self.optimizers:
            vars(muted).pop("zero_grad", None)
        if sum(p.grad is not None for p in module.parameters()) != self._gradients:
            name = f"{type(module).__name__}.optimizer_zero_grad"
            rule = "must zero gradients through optimizer.zero_grad only"
            raise argument_error(WHERE, "model", name, rule, "Remove the override")
        self.pre_backward(closure_loss)
        closure_loss = self.precision_plugin.pre_backward(closure_loss, module)
        closure_loss = self.precision_plugin.post_backward(closure_loss, module)
        self.post_backward(closure_loss)
        return closure_loss

    @override
    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: Any = None,
        **kwargs: Any,
    ) -> Any:
        assert self._parameters is not None
        check = check_settings(optimizer, self._parameters.group, self.root_device)

        def checked() -> Any:  # after the batch has run, and before the optimizer steps
            result = closure()
            check()
            return result

        return super().optimizer_step(optimizer, checked, model, **kwargs)

    @override
    def validation_step(self, batch: Any, *rest: Any, **kwargs: Any) -> Any:
        return self._evaluate("validation", batch, (*rest, *kwargs.values()))

    @override
    def test_step(self, batch: Any, *rest: Any, **kwargs: Any) -> Any:
        return self._evaluate("test", batch, (*rest, *kwargs.values()))

    @override
    def predict_step(self, batch: Any, *rest: Any, **kwargs: Any) -> Any:
        return self._evaluate("predict", batch, (*rest, *kwargs.values()))

    def _evaluate(self, loop: str, batch: Any, rest: tuple[Any, ...]) -> Any:
        assert self._steps is not None
        self._check_batch(loop, batch)
        contexts: dict[str, Callable[[], Any]] = {
            "validation": self.precision_plugin.val_step_context,
            "test": self.precision_plugin.test_step_context,
            "predict": self.precision_plugin.predict_step_context,
        }
        step = getattr(self.lightning_module, f"{loop}_step")
        count = self._count_for(batch)
        return self._steps.evaluate(step, batch, rest, count, context=contexts[loop])

    def timeline(self) -> list[Event]:
        """When each action of the latest training batch ran, on all ranks; collective.

        In order, rank by rank, with seconds of the wall clock. The loss is a part of the last
        stage's forward.

        Raises:
            ValueError: If nothing was recorded.
        """
        where = f"{WHERE}.timeline"
        if not self.record_timeline:
            rule, way_out = "nothing was recorded", f"Use {WHERE}(record_timeline=True)"
            raise argument_error(where, "record_timeline", False, rule, way_out)
        gathered: list[Any] = [None] * self.world_size
        distributed.all_gather_object(gathered, self._timeline)
        if not all(gathered):
            rule = "no training batch has run through the pipeline"
            raise argument_error(where, "record_timeline", True, rule, "Call it after a step")
        return [event for events in gathered for event in events]

    # Gradients

    def total_grad_norm(self) -> Tensor:
        """Norm of the gradients of all stages; collective."""
        assert self._parameters is not None
        return self._parameters.total_norm()

    def _clip_by_norm(self, optimizer: Optimizer, clip_val: float) -> None:
        assert self._parameters is not None
        parameters = self.precision_plugin.main_params(optimizer)
        self._parameters.clip_by_norm(parameters, clip_val)

    def _see_whole_values(self, trainer: Any, module: pl.LightningModule) -> None:
        """Let the user's hooks find gradients and weights of all stages."""
        assert self._parameters is not None
        values = WholeValues(module, self._parameters.ranks, self._hooks_group, self.root_device)
        self._undo.append(values.wrap([module, *trainer.callbacks]))
        outside = [
            (trainer, "save_checkpoint"),
            (self, "total_grad_norm"),
            (self.precision_plugin, "clip_grad_by_norm"),
        ]
        for owner, name in outside:
            vars(owner)[name] = values.outside(getattr(owner, name))
            self._undo.append(partial(vars(owner).pop, name, None))

    # Collectives

    @override
    def barrier(self, name: str | None = None) -> None:
        if distributed.is_initialized():
            distributed.barrier()

    @override
    def broadcast(self, obj: Any, src: int = 0) -> Any:
        box = [obj]
        if distributed.is_initialized():
            distributed.broadcast_object_list(box, src)
        return box[0]

    @override
    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Over the data-parallel replicas, of which there is one: every rank has the value."""
        return tensor

    @override
    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        value = torch.tensor(int(decision), device=self.root_device)
        op = distributed.ReduceOp.MIN if all else distributed.ReduceOp.MAX
        if distributed.is_initialized():
            distributed.all_reduce(value, op)
        return bool(value)

    # The end

    @override
    def on_exception(self, exception: BaseException) -> None:
        if not isinstance(exception, failure.PipelineError):
            place = f"rank {self.global_rank}, between steps"
            told = failure.pipeline_error(place, exception)
            if hasattr(exception, "add_note"):  # Python 3.11; it may only have lost its peer
                exception.add_note(f"{type(told).__name__}: {told}")
        failure.leave()

    @override
    def teardown(self) -> None:
        if self._chain is not None:
            self._chain.close()
        self._chain = self._steps = None
        while self._undo:
            self._undo.pop()()
        vars(self.precision_plugin).pop("clip_grad_by_norm", None)
        module = self.lightning_module
        if self.start_method != "popen" and self._parameters and distributed.is_initialized():
            # Lightning takes the weights back to the process that started the others.
            whole_state.complete_first_rank(self._parameters)
        if module is not None:
            move_here(module, torch.device("cpu"))
        self.precision_plugin.teardown()
        assert self.accelerator is not None
        assert self.cluster_environment is not None
        self.accelerator.teardown()
        self.checkpoint_io.teardown()
        self.cluster_environment.teardown()


def _nothing(*_: Any, **__: Any) -> None:
    """In place of ``zero_grad`` while the gradients of this batch are there already."""
