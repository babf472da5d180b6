"""Pipeline parallelism: the layers of a model on several devices, the batch in micro-batches.

torch.distributed.pipelining has the schedules and sends the tensors; what it leaves open is here:
where an ordinary LightningModule is cut, one loss and one log on all ranks, gradient accumulation,
clipping, tied weights, changing shapes, checkpoints, and failures that end every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.optim import Optimizer
from typing_extensions import override

from lightning_align._compat import lightning_quiet, lightning_trainer
from lightning_align._declared import declared
from lightning_align._errors import add_note
from lightning_align.models.weights import parameters_on_meta
from lightning_align.pipelining import Event, read_schedule_csv
from lightning_align.run.protocols import arranged
from lightning_align.strategies import failure, launching
from lightning_align.strategies.pipeline import checks, whole_state
from lightning_align.strategies.pipeline.batch_step import BatchStep
from lightning_align.strategies.pipeline.chain import Chain
from lightning_align.strategies.pipeline.checkpoints import StageCheckpoints
from lightning_align.strategies.pipeline.cutting import CostsOfLayers
from lightning_align.strategies.pipeline.early_gradients import EarlyGradients
from lightning_align.strategies.pipeline.microbatches import batch_rows, count_that_divides
from lightning_align.strategies.pipeline.ownership import move_here
from lightning_align.strategies.pipeline.runtime import gather_timeline
from lightning_align.strategies.pipeline.set_up import set_up
from lightning_align.strategies.pipeline.steps import PipelineSteps
from lightning_align.strategies.pipeline.whole_values import own_group


@declared
class PipelineStrategy(StageCheckpoints):
    """Train an ordinary LightningModule with its layers spread over several processes.

    The batch of a step is cut into micro-batches, which follow each other through the stages. Every
    rank loads the same batch and runs the module's own step on each micro-batch, up to the end of
    its stage; what the last stage logs is logged on every rank. The chain of layers is what the
    step calls: the blocks of a ``PretrainModule`` or of one language model of transformers, the
    layers of one ``nn.Sequential`` that holds all parameters, or what ``pipeline_layers()`` of the
    module returns (and ``pipeline_inputs(batch)``, if the first is to be called with something
    else than its step passes on). Rows that belong together are put into one by
    ``pipeline_batch(batch)``, if the module has it, as ``DPOModule`` does with pairs. Each layer
    must get what the one before it returned, and only the last one's output may go on. A loss that
    is a mean is averaged over micro-batches, weighted by ``pipeline_microbatch_weight(batch)`` if
    the module has it; one that is a sum (``loss_reduction = "sum"`` on the module) is added up.

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
    # Made by ``set_up``.
    _chain: Chain | None = None
    _steps: PipelineSteps | None = None
    _early_gradients: EarlyGradients
    _first_batches: checks.FirstBatches

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
        several = checks.check_arguments(schedule, num_microbatches, num_stages_per_rank)
        if schedule_csv is not None:
            read_schedule_csv(schedule_csv, where="PipelineStrategy", argument="schedule_csv")
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
        self._costs = CostsOfLayers()
        self._timeline: list[Event] = []
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
        checks.check_size(self.pipeline_parallel_size, self.world_size)
        shape, names = (1, self.world_size), ("data_parallel", "pipeline")
        self.device_mesh = init_device_mesh(self.root_device.type, shape, mesh_dim_names=names)
        assert self.lightning_module is not None
        self.lightning_module._device_mesh = self.device_mesh
        # Here, where the ranks have just met: nobody would notice that a peer fails meanwhile.
        self._hooks_group = own_group()

    # Set-up

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        set_up(self, trainer)  # in steps whose order matters
        lightning_quiet.begin(lightning_quiet.IN_A_PIPELINE)
        self._undo.append(lambda: lightning_quiet.end(lightning_quiet.IN_A_PIPELINE))

    @contextmanager
    @override
    def tensor_init_context(self, empty_init: bool | None = None) -> Iterator[None]:
        empty = self.empty_init if empty_init is None else empty_init
        device = parameters_on_meta() if empty else self.root_device
        with device, self.precision_plugin.tensor_init_context():
            yield

    @override
    def model_to_device(self) -> None:
        assert self.model is not None
        move_here(self.model, self.root_device)

    # Steps

    @property
    def _num_stages(self) -> int:
        return self.world_size * self.num_stages_per_rank

    def _count_for(self, batch: Any) -> int:
        wanted = self.num_microbatches or (1 if self._num_stages == 1 else 4 * self._num_stages)
        return count_that_divides(batch_rows(batch), wanted)

    @override
    def training_step(self, batch: Any, *rest: Any, **kwargs: Any) -> Tensor:
        assert self._steps is not None
        assert self._ownership is not None
        module = self.lightning_module
        assert module is not None
        trainer: Any = module.trainer
        batch = arranged(module, batch)
        self._first_batches.check("train", batch)  # [1], numbered as in steps.py
        window = trainer.accumulate_grad_batches
        # Lightning zeroes gradients behind this hook, when the schedule has made new ones.
        if trainer.fit_loop.epoch_loop.batch_idx % window == 0:
            self._early_gradients.begin_window()
        scaler = getattr(self.precision_plugin, "scaler", None)
        scale = scaler.scale if scaler is not None else lambda loss: loss
        call, context = module.training_step, self.precision_plugin.train_step_context
        arguments = batch, (*rest, *kwargs.values()), self._count_for(batch)
        step = BatchStep(call, *arguments, context, trains=True)
        loss = self._steps.train(step, factor=1 / window, scale=scale)  # [2] to [15]
        self.schedule_in_use = self._steps.runtime.schedule_in_use
        self._timeline = self._steps.runtime.timeline
        # [16] Once a window: sums of sums would count what is there already again.
        if not lightning_trainer.is_accumulating(trainer):
            self._ownership.sum_shared_gradients()
        self._early_gradients.keep(self.optimizers)  # [17]
        return loss

    @override
    def backward(
        self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """The hooks around backward; the schedule has done the work."""
        module = self.lightning_module
        assert module is not None
        self._early_gradients.release(self.optimizers)
        self.pre_backward(closure_loss)
        closure_loss = self.precision_plugin.pre_backward(closure_loss, module)
        closure_loss = self.precision_plugin.post_backward(closure_loss, module)
        self.post_backward(closure_loss)
        return closure_loss

    @override
    def optimizer_step(
        self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any
    ) -> Any:
        assert self._ownership is not None
        # [18] Asked for before the batch runs, so that the answer is there behind it.
        check = checks.check_settings(optimizer, self._ownership.group, self.root_device)

        def checked() -> Any:
            result = closure()
            check()  # behind backward, before any weight changes
            return result

        return super().optimizer_step(optimizer, checked, model, **kwargs)

    @override
    def validation_step(self, batch: Any, *rest: Any, **kwargs: Any) -> Any:
        context = self.precision_plugin.val_step_context
        return self._evaluate("validation", context, batch, (*rest, *kwargs.values()))

    @override
    def test_step(self, batch: Any, *rest: Any, **kwargs: Any) -> Any:
        context = self.precision_plugin.test_step_context
        return self._evaluate("test", context, batch, (*rest, *kwargs.values()))

    @override
    def predict_step(self, batch: Any, *rest: Any, **kwargs: Any) -> Any:
        context = self.precision_plugin.predict_step_context
        return self._evaluate("predict", context, batch, (*rest, *kwargs.values()))

    def _evaluate(self, loop: str, context: Any, batch: Any, rest: tuple[Any, ...]) -> Any:
        module = self.lightning_module
        assert self._steps is not None
        assert module is not None
        batch = arranged(module, batch)
        self._first_batches.check(loop, batch)
        call = getattr(module, f"{loop}_step")
        return self._steps.evaluate(BatchStep(call, batch, rest, self._count_for(batch), context))

    def total_grad_norm(self) -> Tensor:
        """Norm of the gradients of all stages; collective."""
        assert self._ownership is not None
        return self._ownership.total_norm()

    @property
    def waited_s(self) -> float:
        """Seconds of training steps, so far, in which this rank waited for others and messages.

        On a device that computes while the next operation is prepared, only with
        ``record_timeline``; without, waiting is a part of forward.
        """
        return 0.0 if self._steps is None else self._steps.runtime.waited_s

    @property
    def backward_s(self) -> float:
        """Seconds of backward, so far, which runs within the training step; see ``waited_s``."""
        return 0.0 if self._steps is None else self._steps.runtime.current.busy_s["B"]

    def timeline(self) -> list[Event]:
        """When each action of the latest training batch ran, on all ranks; collective.

        In order, rank by rank, with seconds of the wall clock. The loss is a part of the last
        stage's forward.

        Raises:
            ValueError: If nothing was recorded.
        """
        return gather_timeline(self._timeline, self.record_timeline)

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
            error = failure.pipeline_error(f"rank {self.global_rank}, between steps", exception)
            # it may only have lost its peer
            add_note(exception, f"{type(error).__name__}: {error}")
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
        if self.start_method != "popen" and self._ownership and distributed.is_initialized():
            # Lightning takes the weights back to the process that started the others.
            whole_state.complete_first_rank(self._ownership)
        if module is not None:
            move_here(module, torch.device("cpu"))
        self.precision_plugin.teardown()
        assert self.accelerator is not None
        assert self.cluster_environment is not None
        self.accelerator.teardown()
        self.checkpoint_io.teardown()
        self.cluster_environment.teardown()
