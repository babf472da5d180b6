"""SnapshotEngine: copy a state now, write it while training goes on, keep what is whole."""

import atexit
import contextlib
import gc
import json
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

from lightning_align._declared import declared
from lightning_align._errors import argument_error
from lightning_align.checkpointing.commit import commit, remove, sweep, withdraw
from lightning_align.checkpointing.files import Bytes, Folder
from lightning_align.checkpointing.frozen import freeze, thaw
from lightning_align.checkpointing.latest import (
    committed_checkpoints,
    load_checkpoint,
    withdrawn_names,
)
from lightning_align.checkpointing.lineage import Lineage
from lightning_align.checkpointing.lock import FolderLock
from lightning_align.checkpointing.manifest import DATA, LINEAGE, WITHDRAWN, Manifest, newest_first
from lightning_align.checkpointing.pool import Snapshot, SnapshotPool
from lightning_align.checkpointing.results import Commit, SaveError, SaveResult
from lightning_align.checkpointing.writer import Writer, attempt

Backpressure = Literal["wait", "skip", "latest"]
_REMOTE_ATTEMPTS = 3
_RETRY_S = 1.0
_EXIT_TIMEOUT_S = 60.0


@declared
class SnapshotEngine:
    """Saves states of a training run without making it wait for a disk.

    :meth:`save` copies the state into host memory that is allocated once, and returns; a background
    thread writes the copy. A checkpoint exists once its manifest does, which is written last.

    Failures of the background thread never raise in :meth:`save`: they are warned of by the next
    call, and kept for :meth:`pop_errors`.

    Args:
        dirpath: Folder of the checkpoints, a local path or any fsspec URL.
        persist: Whether to write at all; without, snapshots stay in memory.
        keep_last: Number of snapshots kept in memory, for :meth:`restore`.
        backpressure: What a save does while all buffers wait to be written: ``wait`` for one,
            ``skip`` this save, or keep only the ``latest`` of those that wait.
        storage_options: Passed to the filesystem of the URL.
        on_commit: Called on the background thread with each :class:`Commit`.
        wait_timeout_s: Longest that a save waits for an earlier one; it is then skipped.
        commits_before: Commits in other folders that come before those in this one.

    Raises:
        ValueError: If an argument is out of range.
        RuntimeError: If another run writes to ``dirpath``.
    """

    def __init__(
        self,
        dirpath: str | os.PathLike[str] = ".",
        persist: bool = True,
        keep_last: int = 1,
        *,
        backpressure: Backpressure = "wait",
        storage_options: dict[str, Any] | None = None,
        on_commit: Callable[[Commit], None] | None = None,
        wait_timeout_s: float = 1800.0,
        commits_before: int = 0,
    ) -> None:
        if keep_last < 1:
            raise argument_error("SnapshotEngine", "keep_last", keep_last, "must be at least 1")
        if backpressure not in get_args(Backpressure):
            rule = "must be 'wait', 'skip' or 'latest'"
            raise argument_error("SnapshotEngine", "backpressure", backpressure, rule)
        self.persist = persist
        self.keep_last = keep_last
        self.backpressure = backpressure
        self.folder = Folder(dirpath, storage_options)
        self._on_commit = on_commit
        self._wait_timeout_s = wait_timeout_s
        # The latest of those that wait must not take the place of the one being written.
        limit = max(keep_last, 2) if backpressure == "latest" and persist else keep_last
        self._pool = SnapshotPool(limit)
        self._saves = 0
        self._committed: dict[str, Manifest] = {}
        self._lineage = Lineage([], commits_before)
        self.withdrawn: set[str] = set()  # names of those that the run has gone back behind
        self._foreign: set[str] = set()  # names of files that are no checkpoints of ours
        self._durable = 0  # number of the latest save that is on disk
        self._deferred: list[tuple[str, int]] = []  # deletions, for when something newer is durable
        self._errors: list[SaveError] = []
        self._unreported: list[SaveError] = []
        self._writer = Writer[_Job]("checkpoint-writer")
        self._pid = os.getpid()
        self._closed = self._released = False
        if persist:
            self._open_folder(commits_before)

    def _open_folder(self, commits_before: int) -> None:
        self.folder.create()
        self._lock = FolderLock(self.folder)
        self._lock.acquire()
        try:
            sweep(self.folder)
            self._committed = {found.name: found for found in committed_checkpoints(self.folder)}
            self._lineage = Lineage(self._committed.values(), commits_before)
            self.withdrawn = withdrawn_names(self.folder.names())
            self._lineage.withdraw(self.withdrawn, self._committed)
            names = {file.split(DATA)[0] for file in self.folder.names() if DATA in file}
            self._foreign = names - self._committed.keys()
        except BaseException:
            self._lock.release()
            raise
        atexit.register(self.close, _EXIT_TIMEOUT_S)

    # What training calls.

    def save(
        self, state: Any, name: str, step: int, metadata: dict[str, Any] | None = None
    ) -> SaveResult:
        """Copy a state and have it written as ``<name>.ckpt``.

        Args:
            state: Nested dicts, lists and tuples of tensors and other values.
            name: Name of the checkpoint, which must be new.
            step: Optimizer steps that the state is the result of, for the manifest.
            metadata: Plain values that JSON can hold, for the manifest, which adds ``lineage``.

        Raises:
            ValueError: If the name is taken or no file name, the state cannot be copied, or JSON
                cannot hold the metadata.
            RuntimeError: If the engine was closed, or belongs to the process this one was forked
                from.
        """
        start = time.perf_counter()
        if self._closed or self._pid != os.getpid():
            why = "it was closed" if self._closed else "it belongs to the parent of this process"
            raise RuntimeError(f"SnapshotEngine.save(name={name!r}): {why}.")
        self._check_name(name)
        plain = _plain(metadata or {})
        self._report()
        replaced = self.replace_waiting()
        snapshot = self._free_snapshot()
        waited_s = time.perf_counter() - start
        if snapshot is None:
            return SaveResult(0, waited_s, waited_s, skipped=True, replaced=replaced)
        with _no_collection():
            structure, tensors = freeze(state)
            snapshot.number = -1
            copied_bytes = snapshot.buffer.copy(tensors, state)
        snapshot.structure, snapshot.name, snapshot.step = structure, name, step
        snapshot.metadata = plain
        snapshot.number = self._saves = self._saves + 1
        if self.persist:
            snapshot.pending = True
            failed = partial(self._not_written, snapshot)
            self._writer.submit(_Job(partial(self._write, snapshot), failed, snapshot))
        return SaveResult(copied_bytes, time.perf_counter() - start, waited_s, replaced=replaced)

    def continue_from(self, name: str | None, step: int) -> list[Manifest]:
        """Say which checkpoint was loaded, and return those of the folder that are left by that.

        They stay, and the newest of them stays the newest, until the next save is committed.

        Args:
            name: Name of the checkpoint; None if it is in another folder.
            step: The step it was saved at: what is left by it are later steps.
        """
        withdrawn = self.withdrawn - {name}
        known = {each: found for each, found in self._committed.items() if each not in withdrawn}
        left = self._lineage.continue_from(name, step, known)
        self._lineage.withdraw(withdrawn, self._committed)
        return left

    def withdraw(self, is_later: Callable[[int, dict[str, Any]], bool]) -> list[str]:
        """Take back the checkpoints of a stretch that the run has gone back behind.

        They stay, but none is the newest again, not even after a crash, unless nothing else is
        whole; one that is being written is among them once it is committed.

        Args:
            is_later: Whether a checkpoint of that step and metadata is of the stretch.

        Returns:
            Their names.
        """
        pending = {each.name: (each.step, each.metadata) for each in self._pool.waiting}
        known = {each.name: (each.step, each.metadata) for each in list(self._committed.values())}
        names = {name for name, about in {**known, **pending}.items() if is_later(*about)}
        names -= self.withdrawn | self._lineage.abandoned
        self.withdrawn |= names
        self._lineage.withdraw(names, self._committed)
        try:
            for name in sorted(names):
                withdraw(self.folder, name)
        except Exception as error:  # training goes on
            what = "Until the next checkpoint is committed, a resume may take one of the stretch"
            self._failed("", -1, f"{what} that this run has gone back behind", error)
        return sorted(names)

    def replace_waiting(self) -> tuple[str, ...]:
        """Give up the saves that the next one takes the place of: only the ``latest`` may wait.

        Returns:
            Their names; :meth:`save` does it, too.
        """
        if self.backpressure != "latest":
            return ()
        cancelled = self._writer.cancel(lambda job: job.snapshot is not None)
        replaced = [job.snapshot for job in cancelled if job.snapshot is not None]
        for snapshot in replaced:
            snapshot.written()
        return tuple(snapshot.name for snapshot in replaced)

    def delete(self, name: str) -> None:
        """Delete a checkpoint, once the saves made before this call are durable.

        If the latest of them fails, it stays until a later one is.
        """
        if self.persist:
            self._writer.submit(self._deletion(name, after=self._saves))

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until everything is written or has failed; whether it is.

        Args:
            timeout_s: Seconds to wait; ``None`` has no limit.
        """
        done = self._writer.wait(timeout_s=timeout_s)
        self._report()
        return done

    def load(self, name: str, **options: Any) -> Any:
        """Load a checkpoint of this folder; one that is being written is waited for.

        Args:
            name: As it was given to ``save``.
            **options: ``map_location`` and ``weights_only``, as in :func:`load_checkpoint`.
        """
        self.wait()
        path = self.folder.path(name + DATA)
        return load_checkpoint(path, storage_options=self.folder.options, **options)

    def restore(self, step: int) -> Any:
        """A copy of a snapshot that is still in memory.

        Args:
            step: As it was given to ``save``.

        Raises:
            ValueError: If none of that step is held.
        """
        for snapshot in self._pool.newest(self.keep_last):
            if snapshot.step == step:
                return thaw(snapshot.structure, snapshot.buffer)
        rule = f"steps in memory: {self.steps or 'none'}"
        raise argument_error("SnapshotEngine.restore", "step", step, rule, "Raise keep_last")

    def forget(self, after: int) -> None:
        """Drop the snapshots of later steps from memory, which is used for the next ones.

        Args:
            after: Step of which the snapshot stays, as those of earlier ones do.
        """
        for snapshot in self._pool.newest(self.keep_last):
            if snapshot.step > after and not snapshot.pending:
                snapshot.empty()

    @property
    def steps(self) -> list[int]:
        """Steps of the snapshots in memory, the newest first."""
        return [snapshot.step for snapshot in self._pool.newest(self.keep_last)]

    @property
    def committed(self) -> list[Manifest]:
        """Checkpoints in the folder, the newest first."""
        return newest_first(list(self._committed.values()), self.withdrawn)

    def pop_errors(self) -> list[SaveError]:
        """What went wrong since the last call."""
        errors, self._errors, self._unreported = self._errors, [], []
        return errors

    def close(self, timeout_s: float | None = None) -> bool:
        """Write what is waiting and give the folder free; whether all was written in time.

        If it was not, another call goes on waiting.

        Args:
            timeout_s: Seconds that this may take; ``None`` has no limit.
        """
        if self._released or self._pid != os.getpid():
            return True
        self._closed = True
        atexit.unregister(self.close)
        done = self.wait(timeout_s)
        if not done:
            names = [job.snapshot.name for job in self._writer.busy if job.snapshot is not None]
            warnings.warn(
                f"Not written within {timeout_s} s: {', '.join(names) or 'a deletion'}."
                f" {self._intact()}",
                stacklevel=2,
            )
            return False
        self._writer.close()
        self._released = True
        if self.persist:
            self._lock.release()
        return True

    def __enter__(self) -> "SnapshotEngine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # What the background thread calls.

    def _write(self, snapshot: Snapshot) -> None:
        self._lock.ensure()
        start = time.perf_counter()
        manifest = self._commit(snapshot)
        self._committed[snapshot.name] = manifest
        self._lineage.commit(manifest)
        self._durable = snapshot.number
        self._tell(manifest, time.perf_counter() - start)
        deferred, self._deferred = self._deferred, []
        for name, after in deferred:
            attempt(self._deletion(name, after))
        snapshot.written()

    def _not_written(self, snapshot: Snapshot, error: BaseException) -> None:
        snapshot.written()
        name, step = snapshot.name, snapshot.step
        what = f"Checkpoint {name!r} (step {step}) was not written to {self.folder}"
        self._failed(name, step, what, error)

    def _tell(self, manifest: Manifest, persist_s: float) -> None:
        if self._on_commit is None:
            return
        try:
            self._on_commit(Commit(self.folder.path(manifest.name + DATA), manifest, persist_s))
        except Exception as error:
            self._failed(manifest.name, manifest.step, "on_commit raised", error)

    def _commit(self, snapshot: Snapshot) -> Manifest:
        name, step = snapshot.name, snapshot.step
        metadata = {**snapshot.metadata, LINEAGE: self._lineage.next(self._committed)}
        attempt = 0
        while True:
            attempt += 1
            files: dict[str, Iterable[Bytes]] = {
                name + DATA: snapshot.buffer.file(snapshot.structure)
            }
            try:
                return commit(self.folder, name, step, files, metadata)
            except Exception:
                with contextlib.suppress(Exception):  # what a full disk needs most
                    remove(self.folder, name, files, announce=False)
                if self.folder.is_local or attempt == _REMOTE_ATTEMPTS:
                    raise
                time.sleep(_RETRY_S * 2 ** (attempt - 1))

    def _deletion(self, name: str, after: int) -> "_Job":
        what = f"Checkpoint {name!r} was not deleted"
        return _Job(partial(self._delete, name, after), partial(self._failed, name, -1, what))

    def _delete(self, name: str, after: int) -> None:
        """Delete a checkpoint, or leave it for later if nothing from ``after`` on is durable."""
        if self._durable < after:
            self._deferred.append((name, after))
            return
        manifest = self._committed.pop(name, None)
        if manifest is not None:
            sign = [name + WITHDRAWN] if name in self.withdrawn else []
            remove(self.folder, name, [*(file.name for file in manifest.files), *sign])
            self.withdrawn.discard(name)

    def _failed(self, name: str, step: int, what: str, error: BaseException) -> None:
        message = f"{what}: {type(error).__name__}: {error}. {self._intact()}"
        found = SaveError(name, step, error, message)
        self._errors.append(found)
        self._unreported.append(found)

    def _intact(self) -> str:
        if not self._committed:
            return f"No complete checkpoint is in {self.folder}."
        last = self.committed[0]
        path = self.folder.path(last.name + DATA)
        return f"Last complete checkpoint: step {last.step} ({path})."

    # Small questions.

    def _check_name(self, name: str) -> None:
        where, taken = "SnapshotEngine.save", self._pool.pending | self._foreign
        if not name or "/" in name or os.sep in name or name.startswith(".") or name.endswith(DATA):
            rule = "must be a file name, without folder and extension"
            raise argument_error(where, "name", name, rule)
        if name in self._committed or name in taken:
            rule = f"{self.folder} has a checkpoint of that name, and none is ever overwritten"
            raise argument_error(where, "name", name, rule, f"Use another one, such as '{name}-v1'")

    def _free_snapshot(self) -> Snapshot | None:
        """A buffer to copy into, waited for where that is the policy."""
        if self.backpressure == "wait" and not self._writer.wait(
            self._pool.has_room, self._wait_timeout_s
        ):
            waited = f"earlier saves were not written within {self._wait_timeout_s} s"
            self._failed("", -1, "A save was skipped", TimeoutError(waited))
            self._report()
        return self._pool.take()

    def _report(self) -> None:
        errors, self._unreported = self._unreported, []
        for error in errors:
            warnings.warn(error.message, stacklevel=3)


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Keep the garbage collector out: many small tensors would make it visit the whole run."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _plain(metadata: dict[str, Any]) -> dict[str, Any]:
    """Metadata as it will be read back."""
    if LINEAGE in metadata:
        rule = f"{LINEAGE!r} is the engine's own"
        raise argument_error("SnapshotEngine.save", "metadata", metadata, rule, "Rename it")
    try:
        plain: dict[str, Any] = json.loads(json.dumps(metadata))
    except (TypeError, ValueError) as error:
        raise argument_error(
            "SnapshotEngine.save", "metadata", metadata, f"must be plain values ({error})"
        ) from error
    return plain


@dataclass(eq=False)
class _Job:
    """What the background thread does: write a snapshot, or delete a checkpoint."""

    run: Callable[[], None]
    failed: Callable[[BaseException], None]
    snapshot: Snapshot | None = None  # that is written
