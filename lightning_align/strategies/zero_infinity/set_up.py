"""How a run of ZeRO-Infinity begins: folder, files of blocks, the module's optimizer."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer

from lightning_align._compat.torch_optimizers import step_with_hooks
from lightning_align._errors import argument_error
from lightning_align.checkpointing.files import Folder
from lightning_align.checkpointing.lock import FolderLock
from lightning_align.offload.activations import Activations
from lightning_align.offload.block import Block
from lightning_align.offload.engine import OffloadEngine
from lightning_align.offload.files import Threads, filesystem
from lightning_align.offload.optimizer_stream import (
    StepsParameters,
    check_optimizer,
    known_parameters,
)
from lightning_align.offload.record import read_record
from lightning_align.offload.store import ShardStore, sweep
from lightning_align.offload.striped import check_drives, mark_drives, strangers
from lightning_align.offload.tiles import tile
from lightning_align.offload.tuning import tuned
from lightning_align.strategies.one_optimizer import one_optimizer
from lightning_align.strategies.zero_infinity.blocks import WHERE, find_blocks
from lightning_align.strategies.zero_infinity.budget import plan
from lightning_align.strategies.zero_infinity.checks import (
    check_trainer,
    hooks_on_gradients,
    sees_gradients,
    warn_of_gradients,
)
from lightning_align.strategies.zero_infinity.counters import layout_of, tell, writing_bar
from lightning_align.strategies.zero_infinity.faults import told_of_set_up
from lightning_align.strategies.zero_infinity.first_values import fill, leave
from lightning_align.strategies.zero_infinity.on_device import find_device, move_there
from lightning_align.strategies.zero_infinity.ranks import persistent_buffers

if TYPE_CHECKING:
    from lightning_align.strategies.zero_infinity.strategy import ZeROInfinityStrategy

WORTH_TUNING = 256 << 20  # bytes of parameters on a drive: less takes no second to move


def set_up(strategy: ZeROInfinityStrategy, trainer: pl.Trainer) -> None:
    """Store the module's values, or find those of the committed step, and fetch them from now on.

    Raises:
        ValueError: If the module cannot be trained with blocks that come and go, or the folder is
            not free.
    """
    module, accelerator = strategy.lightning_module, strategy.accelerator
    assert module is not None
    assert accelerator is not None
    accelerator.setup(trainer)
    check_trainer(trainer, module)
    find_device(strategy)
    fill(strategy, trainer)
    if strategy.ranks.size > 1:
        strategy._buffers = persistent_buffers(module)
    strategy.model = strategy.precision_plugin.convert_module(module)
    if strategy._engine is None:
        _lock_and_open(strategy, module, run_folders(strategy, trainer))
    elif strategy._record is not None:
        strategy._engine.store.recover()
        strategy._engine.whole.read_values()
    assert strategy._engine is not None
    strategy._engine.attach()
    move_there(strategy)
    if trainer.state.fn == TrainerFn.FITTING:
        with one_optimizer(WHERE):
            strategy.setup_optimizers(trainer)
        _take_over(strategy, strategy._engine, trainer)
        batches = trainer.accumulate_grad_batches
        tell(
            strategy._engine,
            layout_of(strategy._engine, batches, gradients_wait=not strategy._early),
            strategy.io_settings.bandwidth,
        )
    strategy.setup_precision_plugin()


def folders_here(strategy: ZeROInfinityStrategy, trainer: pl.Trainer) -> list[Path]:
    """The first folder of each rank of this machine."""
    count = max(strategy.num_processes, 1)
    return [run_folders(strategy, trainer, rank)[0] for rank in range(count)]


def run_folders(
    strategy: ZeROInfinityStrategy, trainer: pl.Trainer, local_rank: int | None = None
) -> list[Path]:
    """A rank's folders, one on each of its drives, which may not be there yet.

    With fewer drives than ranks each rank has one, rank by rank; with more it has several.

    Args:
        strategy: With ``nvme_path``.
        trainer: With ``default_root_dir``.
        local_rank: Which rank of this machine; by default this one.

    Raises:
        ValueError: If the parent of a folder of ``nvme_path`` is not there.
    """
    given = strategy.nvme_path
    if given is None:
        roots = [Path(trainer.default_root_dir) / "zero_infinity"]
    else:
        roots = [Path(path) for path in ([given] if isinstance(given, str) else given)]
        for root in roots:
            if not root.parent.is_dir():
                rule = f"the folder {root.parent} is not there"
                way_out = "Make it, or mount it"
                raise argument_error(WHERE, "nvme_path", given, rule, way_out)
    here, count = strategy.local_rank if local_rank is None else local_rank, strategy.num_processes
    number = strategy.node_rank * count + here  # before processes are started nobody knows it
    return [root / f"rank{number:05d}" for root in roots[here % len(roots) :: max(count, 1)]]


def own_record(strategy: ZeROInfinityStrategy, record: Path) -> Path:
    """This rank's record of the step that some rank's record was named for."""
    assert strategy.lightning_module is not None
    trainer = strategy.lightning_module.trainer
    if record.parent in folders_here(strategy, trainer):
        return run_folders(strategy, trainer)[0] / record.name
    return record.parent.with_name(f"rank{strategy.global_rank:05d}") / record.name


def _lock_and_open(
    strategy: ZeROInfinityStrategy, module: pl.LightningModule, folders: list[Path]
) -> None:
    locks: list[FolderLock] = []
    with ExitStack() as undo:
        for folder in folders if _uses_drive(strategy) else ():
            locks.append(_locked(strategy, folder))
            undo.callback(locks[-1].release)
        with told_of_set_up(strategy.nvme_path, folders[0]):
            strategy._engine = _open(strategy, module, folders, undo)
        undo.pop_all()
    strategy._locks = locks


def _uses_drive(strategy: ZeROInfinityStrategy) -> bool:
    return strategy.devices.uses_drive or strategy.offload_activations == "nvme"


def _locked(strategy: ZeROInfinityStrategy, folder: Path) -> FolderLock:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FolderLock(Folder(folder), f"{WHERE}(nvme_path={{!r}})")
        lock.acquire()
    except OSError as error:
        rule = f"{folder} cannot be written ({error.strerror})"
        raise argument_error(WHERE, "nvme_path", strategy.nvme_path, rule) from error
    if (kind := filesystem(folder)) in ("tmpfs", "ramfs"):
        rank_zero_warn(
            f"{WHERE}(nvme_path={strategy.nvme_path!r}): {folder} is on {kind}, so its files are"
            " memory, which memory_limit does not count, and gone after a reboot. Give a folder on"
            " a drive, or use strategy='zero_infinity_cpu', which needs no copies."
        )
    return lock


def _open(
    strategy: ZeROInfinityStrategy,
    module: pl.LightningModule,
    folders: list[Path],
    undo: ExitStack,
) -> OffloadEngine:
    resumes, folder = strategy._record is not None, folders[0]
    if resumes:
        check_drives(folders)
    elif _uses_drive(strategy):
        _make_way(strategy, folders)
        for place in folders:
            undo.callback(sweep, place)  # what is half made would take room
    blocks, modules = find_blocks(module, strategy.wrap_policy)
    if strategy.tile_numel is not None:
        blocks, modules, strategy._tiled = tile(blocks, modules, strategy.tile_numel)
    ranks = strategy.world_size
    on_device = strategy._copies is not None
    strategy.devices.assign(blocks, ranks, on_device=on_device)
    pinned = bool(strategy.pin_memory) and strategy.root_device.type == "cuda"
    stay = bool(hooks_on_gradients(module.trainer, module))
    memory = plan(
        blocks,
        strategy.memory_limit,
        strategy.buffers,
        gradients_stay=stay,
        ranks=ranks,
        on_device=on_device,
    )
    threads = _threads(strategy, blocks, folders)
    undo.callback(threads.close)
    store = ShardStore(
        folder,
        blocks,
        threads,
        atomic_step=strategy.atomic_step,
        drives=folders[1:],
        ranks=strategy.ranks,
        pinned=pinned,
    )
    undo.callback(store.close)
    activations = None
    if strategy.offload_activations != "none":
        on_disk = strategy.offload_activations == "nvme"
        activations = Activations(
            folder if on_disk else None, threads, strategy._copies, pinned=pinned
        )
    count = min(strategy.ranks.of_all("blocks in memory", memory.blocks))  # they come in one order
    memory = replace(memory, pinned=pinned, blocks=count)
    engine = OffloadEngine(modules, store, threads, memory, activations)
    if resumes:
        leave(strategy, (p for block in blocks for p in block.parameters.values()))
        store.recover()
        engine.whole.read_values()
    else:
        store.allocate(None)  # the rest when there is an optimizer
        with writing_bar(module.trainer, sum(block.nbytes for block in blocks)) as bar:

            def taken(block: Block) -> None:
                leave(strategy, block.parameters.values())
                bar.update(block.nbytes)

            engine.whole.store_values(taken)
    return engine


def _threads(strategy: ZeROInfinityStrategy, blocks: list[Block], folders: list[Path]) -> Threads:
    """Who reads and writes: as given, and for the rest as measured where that is worth a second."""
    on_drive = sum(block.nbytes for block in blocks if block.is_stored or not block.states_stay)
    if on_drive >= WORTH_TUNING:
        given = (strategy.block_size, strategy.thread_count)
        strategy.io_settings = tuned(folders[0], folders[0].parent, *given, strategy.direct_io)
    count, size = strategy.io_settings.thread_count, strategy.io_settings.block_size
    return Threads(count * len(folders), size, strategy.direct_io)


def _make_way(strategy: ZeROInfinityStrategy, folders: list[Path]) -> None:
    """For a run that begins anew: leftovers of a crash go, a committed step does not."""
    may_overwrite = strategy.overwrite or strategy._may_overwrite
    records = {} if may_overwrite else {folder: read_record(folder) for folder in folders}
    for folder, record in records.items():
        if record is not None:
            rule = f"{folder} holds step {record.step} of an earlier run"
            way_out = "Go on from it with fit(ckpt_path='last'), or set another nvme_path or"
            way_out += " overwrite=True"
            raise argument_error(WHERE, "nvme_path", strategy.nvme_path, rule, way_out)
    for folder in () if may_overwrite else strangers(folders):
        rule = f"{folder} holds a part of an earlier run, which had other folders beside it"
        way_out = "Name those, in their order, or set another nvme_path or overwrite=True"
        raise argument_error(WHERE, "nvme_path", strategy.nvme_path, rule, way_out)
    for folder in folders:
        sweep(folder)
    mark_drives(folders)


def _take_over(strategy: ZeROInfinityStrategy, engine: OffloadEngine, trainer: pl.Trainer) -> None:
    """Step the module's optimizer block by block."""
    if not strategy.optimizers:
        rule = "the module must have an optimizer"
        raise argument_error(WHERE, "optimizers", [], rule, "Return one from configure_optimizers")
    optimizer = strategy.optimizers[0]
    check_optimizer(optimizer, WHERE)
    if strategy._tiled and isinstance(optimizer, StepsParameters):
        rule = f"{type(optimizer).__name__} looks at whole matrices, and a tile is a few rows"
        way_out = "Use torch's AdamW, Adam or SGD, or leave it out"
        raise argument_error(WHERE, "tile_numel", strategy.tile_numel, rule, way_out)
    stored = {p for block in engine.blocks for p in block.parameters.values()}
    if not known_parameters(optimizer) <= stored:
        rule = "it must hold parameters of the module only"
        raise argument_error(WHERE, "optimizer", type(optimizer).__name__, rule)
    with told_of_set_up(strategy.nvme_path, engine.store.folder):
        has_masters = trainer.precision == "bf16-true"
        engine.optimize_with(optimizer, fresh=strategy._record is None, has_masters=has_masters)

    def step(_: Optimizer, closure: Callable[[], Any]) -> Any:
        with torch.enable_grad():
            loss = closure()
        engine.updates.step()
        return loss

    vars(optimizer)["step"] = step_with_hooks(optimizer, step)
    module = strategy.lightning_module
    assert module is not None
    hooks = hooks_on_gradients(trainer, module)
    engine.gradients.stay = bool(hooks)
    if hooks:
        warn_of_gradients(hooks, engine.blocks)
    asked = strategy.update_in_backward
    waits = isinstance(optimizer, StepsParameters) or sees_gradients(trainer, module)
    strategy._early = bool(asked) and not waits
    waiting = not strategy._early or trainer.accumulate_grad_batches > 1
    if waiting and not hooks:
        with told_of_set_up(strategy.nvme_path, engine.store.folder):
            engine.gradients.reserve()
    if asked is True and waits:
        rule = "something looks at all gradients between backward and the update: clipping, an"
        rule += " optimizer that skips steps, or a hook"
        raise argument_error(WHERE, "update_in_backward", asked, rule, "Leave it at 'auto'")
