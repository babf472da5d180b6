"""The folder that AsyncCheckpoint writes: which checkpoints are in it, and which may go.

Two threads meet here. Training saves and asks; the writing thread commits, decides what is no
longer needed, and lets the callback name what is there.
"""

import warnings
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_warn

from lightning_align.checkpointing import Commit, SaveError, SaveResult, SnapshotEngine
from lightning_align.checkpointing.files import Folder
from lightning_align.checkpointing.last_link import LAST, LastLink, shown_by
from lightning_align.checkpointing.manifest import DATA, Manifest
from lightning_align.checkpointing.retention import Retention

Formatted = Callable[[int | None], str]  # a name, without or with a version
RUN, SAVES, BATCHES = "run", "saves_of_run", "batches"  # in the metadata of a manifest


class CheckpointFolder:
    """Checkpoints of one run, on the process that writes them; others may be there, and stay.

    Args:
        dirpath: Folder or URL.
        retention: Decides what is kept.
        backpressure: As in ``SnapshotEngine``.
        storage_options: Passed to the filesystem of a URL.
        on_change: Called on the writing thread after each commit, before anything is deleted.
        others: Names of checkpoints that go with the first commit, of runs that give way.
        commits_before: As in ``SnapshotEngine``.
    """

    def __init__(
        self,
        dirpath: str,
        retention: Retention,
        *,
        backpressure: Literal["wait", "skip", "latest"],
        storage_options: dict[str, Any] | None,
        on_change: Callable[[], None],
        others: Sequence[str] = (),
        commits_before: int = 0,
    ) -> None:
        self.dirpath = dirpath
        self.num_saved = self.num_failed = 0
        self._retention, self._on_change = retention, on_change
        self._commits: deque[Commit] = deque()  # that training has not heard of
        self._engine = SnapshotEngine(
            dirpath,
            backpressure=backpressure,
            storage_options=storage_options,
            on_commit=self._on_commit,
            commits_before=commits_before,
        )
        retention.withdraw(self._engine.withdrawn)
        self._link = LastLink(self._engine.folder, retention.keep_newest)
        self._names = {name.split(DATA)[0] for name in self._engine.folder.names()}
        self._names |= {LAST} if self._link.is_kept else set()
        self._others = list(others)
        if retention.newest:  # of an earlier fit of this Trainer
            names = {found.name for found in self._engine.committed}
            self.delete(retention.load_state_dict(retention.state_dict(), names))

    @property
    def saves_of_run(self) -> int:
        """How many saves the run had made, here and in other folders, up to the last one here."""
        return max((order_in_run(found)[0] for found in self._engine.committed), default=0)

    def continue_from(self, path: str, step: int, run_id: str) -> None:
        """Say which checkpoint the run goes on from; newer ones are abandoned by that.

        Args:
            path: Path or URL of the checkpoint that was loaded, in this folder or in another one.
            step: Optimizer steps that the run had taken in it.
            run_id: Of the run; what others have left here stays.
        """
        directory, _, file = path.rpartition("/")
        name = None
        if Folder(directory or ".").key == Folder(self.dirpath).key:
            name = shown_by(self._engine.folder, file.removesuffix(DATA))
            self._retention.protect(name)
        left = self._engine.continue_from(name, step)
        left = [found for found in left if found.metadata.get(RUN) == run_id]
        self._retention.abandon({found.name: found.step for found in left})
        newest = next(iter(self._engine.committed), None)
        if newest is None or newest not in left:
            return
        kept = "stays" if self._retention.save_top_k < 0 else "goes when this run has come to it"
        rank_zero_warn(
            f"AsyncCheckpoint: this run goes back to step {step}; the newest checkpoint in"
            f" {self.dirpath} is of step {newest.step}. Until this run has committed one,"
            f" ckpt_path='last' still means {newest.name!r}, if that is whole. What is left"
            f" behind {kept}."
        )

    def withdraw(self, batches: int) -> list[str]:
        """Take back what was saved behind a batch that the run has gone back to.

        Args:
            batches: Training batches that are part of the run now.

        Returns:
            Names of the checkpoints, some of which may still be being written.
        """
        names = self._engine.withdraw(lambda _, about: about.get(BATCHES, 0) > batches)
        self._retention.withdraw(names)
        self._on_change()
        self._link.show(self._retention.newest)
        return names

    def reserve(self, formatted: Formatted, version: int, score: float | None, keep: bool) -> str:
        """A name for the next save, which ``retention`` knows as pending from now on.

        Args:
            formatted: As in :meth:`free_name`.
            version: As in :meth:`free_name`.
            score: What it is ranked by, if it is among the best.
            keep: Whether it stays without.
        """
        self.make_room()
        name = self.free_name(formatted, version)
        if keep and score is None:
            self._retention.protect(name)
        self._retention.begin(name, score)
        return name

    def free_name(self, formatted: Formatted, version: int) -> str:
        """A name that no file of the folder has, nor any that is being written.

        Args:
            formatted: Makes the name.
            version: First version to try.
        """
        name = formatted(None)
        while name in self._names:
            name, version = formatted(version), version + 1
        self._names.add(name)
        return name

    def save(
        self, checkpoint: dict[str, Any], name: str, step: int, metadata: dict[str, Any]
    ) -> SaveResult:
        """Copy a checkpoint that ``retention`` knows as pending, to be written.

        Args:
            checkpoint: What to write.
            name: Its files begin with it.
            step: Optimizer steps taken, of all optimizers.
            metadata: Plain values to keep in the manifest.
        """
        result = self._engine.save(checkpoint, name, step, metadata)
        self.num_saved += 1
        for lost in (*result.replaced, *([name] if result.skipped else [])):
            self._retention.drop(lost)
        return result

    def make_room(self) -> None:
        """Give up what the next save takes the place of, so that its state does not count on it."""
        for lost in self._engine.replace_waiting():
            self._retention.drop(lost)

    def delete(self, names: list[str]) -> None:
        """Delete checkpoints behind the commits made before."""
        for name in names:
            self._engine.delete(name)

    def new_commits(self) -> list[Commit]:
        """What was committed since the last call."""
        return [self._commits.popleft() for _ in range(len(self._commits))]

    def new_errors(self) -> list[SaveError]:
        """What went wrong since the last call."""
        errors = self._engine.pop_errors()
        for error in errors:
            self.num_failed += bool(error.name)
            self._retention.drop(error.name)
        return errors

    def wait(self, timeout_s: float | None) -> None:
        """Wait until everything is written or has failed.

        Args:
            timeout_s: Seconds to wait; None has no limit.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # new_errors tells of the same
            self._engine.wait(timeout_s)

    def close(self, timeout_s: float | None) -> None:
        """Write what is waiting, and give the folder free.

        Args:
            timeout_s: Seconds that this may take; None has no limit.
        """
        self._engine.close(timeout_s)

    def _on_commit(self, commit: Commit) -> None:
        surplus = self._retention.commit(commit.manifest.name, commit.manifest.step)
        self._on_change()
        self._link.show(self._retention.newest)
        self._commits.append(commit)
        others, self._others = self._others, []
        self.delete([*surplus, *others])


def path_in(dirpath: str, name: str, storage_options: dict[str, Any] | None) -> str:
    """Path or URL of a checkpoint's file.

    Args:
        dirpath: Folder or URL.
        name: Name of the checkpoint.
        storage_options: Passed to the filesystem of a URL.
    """
    return Folder(dirpath, storage_options).path(name + DATA)


def order_in_run(manifest: Manifest) -> tuple[int, float]:
    """Sorts the checkpoints of one run that are in several folders, the newest last.

    Args:
        manifest: Of a checkpoint; one without a number comes before the others, by its time.
    """
    return int(manifest.metadata.get(SAVES, 0)), manifest.saved_at
