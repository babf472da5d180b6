"""ZeRO-Infinity (arXiv:2104.07857) as a strategy: the hooks of Lightning around ``offload``.

Everything that a step needs of a model is on disk, cut into blocks; ``OffloadEngine`` fetches,
updates and writes them. What is left to a strategy is when: values are stored at set-up, blocks
come and go in forward and backward, ``optimizer.step`` updates them one after the other, and what
Lightning reads and writes of a whole model is gathered.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, distributed, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_align._compat import lightning_processes, lightning_resume, lightning_trainer
from lightning_align._compat.glibc_memory import map_large_allocations
from lightning_align._declared import declared
from lightning_align.checkpointing.lock import FolderLock
from lightning_align.models.weights import parameters_on_meta
from lightning_align.offload.building import Building
from lightning_align.offload.device import Copies
from lightning_align.offload.files import Threads
from lightning_align.offload.ranks import Ranks
from lightning_align.offload.record import FILE
from lightning_align.offload.tiles import in_parts, whole_values
from lightning_align.offload.tuning import IOSettings
from lightning_align.run.exact_resume import ExactResume
from lightning_align.run.protocols import KnowsGradientFactor
from lightning_align.strategies import failure, launching
from lightning_align.strategies.zero_infinity.blocks import WHERE, WrapPolicy
from lightning_align.strategies.zero_infinity.budget import Buffers
from lightning_align.strategies.zero_infinity.checkpoints import BlockCheckpoints
from lightning_align.strategies.zero_infinity.checks import check_arguments
from lightning_align.strategies.zero_infinity.commits import CommitSteps
from lightning_align.strategies.zero_infinity.counters import LogTraffic
from lightning_align.strategies.zero_infinity.devices import Devices
from lightning_align.strategies.zero_infinity.faults import tell_what_is_left
from lightning_align.strategies.zero_infinity.first_values import built_on_disk, fill
from lightning_align.strategies.zero_infinity.on_device import move_back
from lightning_align.strategies.zero_infinity.ranks import (
    end_together,
    is_committed,
    join,
    share_buffers,
)
from lightning_align.strategies.zero_infinity.set_up import folders_here, set_up


@declared
class ZeROInfinityStrategy(BlockCheckpoints):
    """Train a LightningModule whose parameters, gradients and optimizer state are on disk.

    Memory holds a few blocks at a time, whatever the depth. A block is read before its forward, and
    again before its backward; its gradients leave memory when they are there, and the module's own
    optimizer steps it a few tensors at a time. The result is that of the same training in memory,
    to the bit. Every step is written to other files than the one before and counts once it is
    whole: after a kill ``fit(ckpt_path="last")`` goes on with the last one that is.

    A block is an element of the module's outermost ``nn.ModuleList`` or ``nn.Sequential``. What
    belongs to no block, or is tied, stays in memory: embedding, head and final norm of a language
    model. Costs 12 bytes of disk a parameter with AdamW in fp32, twice that with ``atomic_step``,
    and 28 bytes of traffic a step, 36 where gradients wait, as for clipping.

    Args:
        stage: What comes and goes block by block: at 3 everything, at 2 gradients and optimizer
            state while parameters stay whole in memory, at 1 optimizer state alone.
        offload_params_device: Where parameters lie: ``"nvme"``, or in host memory (``"cpu"`` or
            ``"none"``, which are one place on a CPU; with ``"none"`` they stay on a GPU, too). At
            stages 1 and 2 ``"nvme"`` has the copy that a commit needs.
        offload_optimizer_device: The same, of optimizer state and, at stages 2 and 3, of gradients.
        offload_fraction: Share of bytes on NVMe of what could be there; other blocks are in host
            memory.
        offload_activations: Where what forward saves waits for backward: ``"none"`` leaves it
            there, ``"cpu"`` moves it to host memory (on a CPU that is the same), ``"nvme"`` to
            disk. Under activation checkpointing these are the inputs of blocks, otherwise all that
            operations save; what has less than 64 KiB stays.
        nvme_path: Folder for the files; by default ``zero_infinity`` below ``default_root_dir``.
            Of a list of folders, one on each drive, ranks take one after the other; where there
            are more than ranks, files are striped.
        memory_limit: Bytes that the strategy may hold, such as ``"4GB"``, beside activations and
            libraries; ``"auto"`` takes the least that overlaps reads with compute.
        params_buffer_count: Blocks of parameters in memory at a time, at least 2, and 3 where a GPU
            computes; by default 3, or what ``memory_limit`` leaves.
        optimizer_buffer_count: Groups of optimizer state in memory at a time, by default 2.
        sub_group_size: Parameters of such a group, by default 2 million, or what ``memory_limit``
            leaves.
        block_size: Bytes of one read or write; None measures, where that is worth a second.
        thread_count: Threads that read and write, for each drive; None measures as well.
        pin_memory: Whether to register buffers with CUDA, so that copies overlap with compute;
            ``"auto"`` does where a GPU computes.
        direct_io: Whether to go past the page cache; ``"auto"`` does where the filesystem lets us.
        atomic_step: Whether a step that a kill interrupts leaves the one before it whole, for twice
            the disk; without effect where anything is in host memory alone, as no step is committed
            then.
        update_in_backward: Whether a block is updated as soon as its gradients are there, so that
            they need not be stored; ``"auto"`` does where nothing looks at all gradients first.
        wrap_policy: Classes of modules that are blocks (paths in YAML), or a function that says of
            a module whether it is one.
        tile_numel: Elements of a weight from which on a Linear of a block is cut into tiles of so
            many, each of which comes and goes by itself; None cuts none.
        save_distributed_checkpoint: Whether a checkpoint is a folder of links to the files, which
            takes milliseconds; otherwise it is one file, whose bytes are written anew.
        empty_init: Whether the command line, ``configure_model`` and ``trainer.init_module`` build
            models without values, which are then drawn by name or read from safetensors; otherwise
            the latter two build them on disk, with the values of a build in memory.
        overwrite: Whether a committed step of an earlier run in ``nvme_path`` may be deleted.
        timeout: How long to wait for other ranks.
        process_group_backend: torch's name of the backend; None chooses by device.
        start_method: How processes are started: ``"popen"``, ``"spawn"``, ``"fork"`` or
            ``"forkserver"``.

    Raises:
        ValueError: If a value is out of its range.

    Example:
        >>> strategy = ZeROInfinityStrategy(memory_limit="4GB")

    Note: training on a GPU has not been run yet, and a warning says so. Manual optimization,
    several optimizers, optimizers that look across parameters (LBFGS) and loss scalers are refused
    at set-up.
    """

    strategy_name = "zero_infinity"

    def __init__(
        self,
        stage: Literal[1, 2, 3] = 3,
        offload_params_device: Literal["nvme", "cpu", "none"] = "nvme",
        offload_optimizer_device: Literal["nvme", "cpu", "none"] = "nvme",
        offload_fraction: float = 1.0,
        offload_activations: Literal["none", "cpu", "nvme"] = "none",
        nvme_path: str | list[str] | None = None,
        memory_limit: int | str = "auto",
        params_buffer_count: int | None = None,
        optimizer_buffer_count: int | None = None,
        sub_group_size: int | None = None,
        block_size: int | None = None,
        thread_count: int | None = None,
        pin_memory: bool | Literal["auto"] = "auto",
        direct_io: bool | Literal["auto"] = "auto",
        atomic_step: bool = True,
        update_in_backward: bool | Literal["auto"] = "auto",
        wrap_policy: list[str] | WrapPolicy | None = None,
        tile_numel: int | None = None,
        save_distributed_checkpoint: bool = True,
        empty_init: bool = False,
        overwrite: bool = False,
        timeout: timedelta = timedelta(minutes=10),
        process_group_backend: str | None = None,
        start_method: Literal["popen", "spawn", "fork", "forkserver"] = "popen",
    ) -> None:
        super().__init__()
        check_arguments(nvme_path, memory_limit, offload_activations, tile_numel)
        self.devices = Devices(
            stage, offload_params_device, offload_optimizer_device, offload_fraction
        )
        if self.devices.uses_drive:
            map_large_allocations()  # before the model is made, if that comes later
        self.buffers = Buffers(params_buffer_count, optimizer_buffer_count, sub_group_size)
        io = IOSettings.given(block_size, thread_count)
        Threads(io.thread_count, io.block_size, direct_io).close()  # checks them
        self.offload_activations = offload_activations
        self.nvme_path = nvme_path
        self.memory_limit = memory_limit
        self.block_size = block_size
        self.thread_count = thread_count
        self.io_settings = io
        self.pin_memory = pin_memory
        self.direct_io = direct_io
        self.atomic_step = atomic_step
        self.update_in_backward = update_in_backward
        self.wrap_policy = wrap_policy
        self.tile_numel = tile_numel
        self.save_distributed_checkpoint = save_distributed_checkpoint
        self.empty_init = empty_init
        self.overwrite = overwrite
        self.timeout = timeout
        self.process_group_backend = process_group_backend
        self.start_method = start_method
        self.num_nodes = 1
        self._locks: list[FolderLock] = []
        self.ranks = Ranks()
        self._buffers: list[str] = []  # that ranks share
        self._may_overwrite = False  # since what is resumed from is newer
        self._copies: Copies | None = None  # to the device, if that is not the host
        self._building: Building | None = None  # what is built and not in blocks yet
        self._early = False  # whether the open window is updated in backward

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
    def is_distributed(self) -> bool:
        """Whether each rank loads its part of the data, and what is logged is averaged."""
        return self.num_processes * self.num_nodes > 1

    @override
    def _configure_launcher(self) -> None:
        self._launcher = launching.launcher(self)
        launch = partial(self._launch, self._launcher.launch)
        vars(self._launcher)["launch"] = launch

    def _launch(self, launch: Callable[..., Any], *args: Any, trainer: Any, **kwargs: Any) -> Any:
        """Where a run begins, before Lightning looks for what it goes on from."""
        lightning_resume.offer_last(trainer, partial(self._newest, trainer))
        return launch(*args, trainer=trainer, **kwargs)

    def _newest(self, trainer: pl.Trainer, found: str | None) -> str | None:
        """The committed step, or the checkpoint that Lightning has found, if that is newer."""
        if not self.devices.commits:
            rank_zero_warn(
                f"{WHERE}: parameters or optimizer state are in host memory, so no step is"
                " committed: ckpt_path='last' is the latest checkpoint of a callback."
            )
            return found
        try:
            records = [folder / FILE for folder in folders_here(self, trainer)]
        except ValueError:  # of this rank alone, maybe: the others hear of it at set-up
            return found
        if not is_committed([record.parent for record in records]):
            self._may_overwrite = any(record.is_file() for record in records)
            return found
        saved = get_filesystem(found).modified(found).timestamp() if found is not None else 0.0
        written = max(record.stat().st_mtime for record in records if record.is_file())
        self._may_overwrite = saved > written
        return found if self._may_overwrite else str(records[self.local_rank])

    @override
    def setup_environment(self) -> None:
        super().setup_environment()
        join(self)
        assert self.lightning_module is not None
        trainer: Any = self.lightning_module.trainer
        self.know_of_saving(trainer)
        present = {type(callback) for callback in trainer.callbacks}
        commits = (CommitSteps,) if self.devices.commits else ()
        for kind in (ExactResume, *commits, LogTraffic):
            if kind not in present:
                trainer.callbacks.append(kind())

    # Set-up

    @override
    def connect(self, model: pl.LightningModule) -> None:
        if model is not self.lightning_module:
            self.close()
        elif self._engine is not None:
            self._engine.attach()  # setup hooks may call the model, as our modules' do
        self._record = self._folder = None
        super().connect(model)

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        set_up(self, trainer)
        vars(self.precision_plugin)["clip_grad_by_norm"] = self._clip_by_norm
        vars(self.precision_plugin)["clip_grad_by_value"] = self._clip_by_value

    @contextmanager
    @override
    def tensor_init_context(self, empty_init: bool | None = None) -> Iterator[None]:
        empty = self.empty_init if empty_init is None else empty_init
        device = parameters_on_meta() if empty else built_on_disk(self)
        with device, torch.device("cpu"), self.precision_plugin.tensor_init_context():
            yield

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        if self._engine is None:  # before the set-up
            assert self.lightning_module is not None
            fill(self, self.lightning_module.trainer)
        super().load_model_state_dict(checkpoint, strict)

    @override
    def model_to_device(self) -> None:
        """Nothing: set-up has done it."""

    # Steps

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        assert self._engine is not None
        share_buffers(self)
        with self._engine.forward():
            return super().training_step(*args, **kwargs)

    @override
    def on_validation_start(self) -> None:
        share_buffers(self)

    @override
    def on_test_start(self) -> None:
        share_buffers(self)

    @override
    def on_predict_start(self) -> None:
        share_buffers(self)

    @override
    def backward(
        self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any
    ) -> Tensor:
        assert self._engine is not None
        assert self.lightning_module is not None
        module = self.lightning_module
        closes = not lightning_trainer.is_accumulating(module.trainer)
        factor = None
        stay = self._engine.gradients.stay  # then hooks see them as they are in memory
        if closes and not stay and isinstance(module, KnowsGradientFactor):
            factor = module.gradient_factor()
        with self._engine.backward(updates=self._early and closes, closes=closes, factor=factor):
            self.pre_backward(closure_loss)
            loss = self.precision_plugin.pre_backward(closure_loss, module)
            self.precision_plugin.backward(loss, module, optimizer, *args, **kwargs)
        loss = self.precision_plugin.post_backward(loss, module)
        self.post_backward(loss)
        return loss

    # Gradients

    def total_grad_norm(self) -> Tensor:
        """Norm of all gradients, those on disk included."""
        assert self._engine is not None
        assert self.lightning_module is not None
        norms = self._engine.gradients.norms_of(self.lightning_module.parameters())
        norm = torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())
        return norm.to(self.root_device)

    def scale_gradients(self, factor: Tensor) -> None:
        """Multiply all gradients, those on disk when the update reads them."""
        assert self._engine is not None
        assert self.lightning_module is not None
        self._engine.scale_gradients(factor, self.lightning_module.parameters())

    def waiting_gradients(self) -> dict[str, Tensor]:
        """Copies of the gradients on disk that wait for their step, by name of parameter."""
        assert self._engine is not None
        # Those of updates that wait are of a window that is closed.
        shown = {} if self._engine.updates_wait else self._engine.gradients.shown()
        return whole_values(shown, self._tiled, self._engine.store.set_aside)

    def put_gradients(self, gradients: Mapping[str, Tensor]) -> set[str]:
        """Let gradients wait on disk for their step, in the place of those that do; their names."""
        assert self._engine is not None
        return self._engine.put_gradients(in_parts(gradients, self._tiled))

    def _clip_by_norm(self, optimizer: Optimizer, clip_val: float) -> None:
        assert self._engine is not None
        parameters = list(self.precision_plugin.main_params(optimizer))
        norms = self._engine.gradients.norms_of(parameters)
        if norms:
            norm = torch.linalg.vector_norm(torch.stack(norms))
            factor = torch.clamp(clip_val / (norm + 1e-6), max=1.0)  # as torch's clip_grad_norm_
            self._engine.scale_gradients(factor, parameters)

    def _clip_by_value(self, optimizer: Optimizer, clip_val: float) -> None:
        assert self._engine is not None
        self._engine.clip_values(clip_val, self.precision_plugin.main_params(optimizer))

    # What others ask

    @override
    def on_train_start(self) -> None:
        super().on_train_start()
        self._record = self._folder = None  # what is put back from now on is something else

    def follow_freezing(self, dropped: Collection[nn.Parameter]) -> None:
        """Forget the optimizer's state of some parameters; what requires a gradient is seen."""
        assert self._engine is not None
        self._engine.updates.forget_state(dropped)

    def let_go(self, parameters: Collection[nn.Parameter]) -> None:
        """Give up the memory of parameters of a frozen module that nobody will run again."""
        assert self._engine is not None
        self._engine.let_go(parameters)

    @property
    def waited_s(self) -> float:
        """Seconds that steps have waited for transfers so far."""
        return 0.0 if self._engine is None else self._engine.threads.traffic.stalled_s

    @property
    def committing_s(self) -> float:
        """Seconds that commits have taken so far, but for waits."""
        return 0.0 if self._engine is None else self._engine.threads.traffic.committing_s

    @property
    def one_rank_runs_model(self) -> bool:
        """Whether rank 0 can call the model while others wait: not if they hold parts of it."""
        return self.world_size == 1

    @property
    def all_ranks_run_model(self) -> bool:
        """Whether all ranks can call the model at once: a block is gathered when it is called."""
        return True

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
        if not isinstance(tensor, Tensor):
            return tensor
        return lightning_processes.reduce_in_place(tensor, group, reduce_op)

    # The end

    @override
    def on_exception(self, exception: BaseException) -> None:
        told = isinstance(exception, ValueError)  # a refusal, and no fault
        if self._engine is not None and self.lightning_module is not None and not told:
            folder, step = self._engine.store.folder, self.lightning_module.trainer.global_step
            whole = self.atomic_step
            tell_what_is_left(exception, self.global_rank, step, folder, atomic_step=whole)
        end_together(self, exception)
        with suppress(OSError, type(exception)):  # what may have failed; what is committed stays
            self.close()
        failure.leave()

    @override
    def teardown(self) -> None:
        if self._engine is not None:
            self._engine.finish_updates()
            self._engine.detach()
            move_back(self)
        for hook in ("clip_grad_by_norm", "clip_grad_by_value"):
            vars(self.precision_plugin).pop(hook, None)
        self.precision_plugin.teardown()
        assert self.accelerator is not None
        assert self.cluster_environment is not None
        self.accelerator.teardown()
        self.checkpoint_io.teardown()
        self.cluster_environment.teardown()

    def close(self) -> None:
        """Close the files; the module's values are there alone, and can no longer be read here."""
        engine, locks = self._engine, self._locks
        self._engine, self._locks = None, []
        try:
            if engine is not None:
                engine.close()
        finally:
            for lock in locks:
                lock.release()
