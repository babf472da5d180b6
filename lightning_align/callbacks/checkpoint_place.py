"""Where a run saves, and where another process finds what one has saved.

A run goes on in the folder that holds its checkpoints. A new one takes the folder that it was given
if no other run has saved there, and else the next version of it: ``version_1`` and so on.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from lightning.pytorch.utilities import rank_zero_warn

from lightning_align.callbacks.checkpoint_folder import RUN, order_in_run
from lightning_align.checkpointing.files import Folder
from lightning_align.checkpointing.latest import (
    committed_checkpoints,
    newest_of_versions,
    newest_whole,
    verify,
    withdrawn_names,
)
from lightning_align.checkpointing.lock import FolderLock
from lightning_align.checkpointing.manifest import DATA, Manifest
from lightning_align.checkpointing.versions import version, versions


class Place(NamedTuple):
    """A folder to write.

    Args:
        dirpath: Path or URL.
        others: Names of checkpoints of other runs there, which go once this one has saved.
        commits_before: Commits of other runs that this one's come behind.
    """

    dirpath: str
    others: tuple[str, ...] = ()
    commits_before: int = 0


def place_of(
    dirpath: str,
    run_id: str,
    *,
    ckpt_path: str | None = None,
    overwrite: bool = False,
    storage_options: dict[str, Any] | None = None,
) -> Place:
    """The folder of a run among those of the runs that were given one folder.

    Args:
        dirpath: The folder that was given, a path or URL.
        run_id: Of the run.
        ckpt_path: What it resumes from; where several folders hold the run, that one's goes on.
        overwrite: Whether other runs give way.
        storage_options: Passed to the filesystem of a URL.

    Raises:
        RuntimeError: If a run that is alive writes there, and this is another one.
    """
    every = versions(Folder(dirpath, storage_options))
    found = {number: committed_checkpoints(folder) for number, folder in every.items()}
    number = _number(every, found, run_id, ckpt_path)
    if number is None and (overwrite or not found[0]):
        number = 0
    elif number is None:
        taken = [each for each in found if found[each]]
        for each in taken:
            _refuse_if_alive(every[each])
        number = 1 + max(taken)
        _tell(dirpath, found[0], number)
    here = found.get(number, [])
    others = [each.name for each in here if overwrite and each.metadata.get(RUN) != run_id]
    commits = max((each.commit_number for group in found.values() for each in group), default=0)
    path = str(version(every[0], number)) if number else dirpath
    return Place(path, tuple(others), commits)


def _number(
    every: dict[int, Folder], found: dict[int, list[Manifest]], run_id: str, ckpt_path: str | None
) -> int | None:
    """Which version holds checkpoints of the run."""
    of_run = [n for n, group in found.items() if any(m.metadata.get(RUN) == run_id for m in group)]
    resumed = Folder((ckpt_path or "").rpartition("/")[0] or ".").key
    return next((n for n in of_run if every[n].key == resumed), next(reversed(of_run), None))


def _refuse_if_alive(folder: Folder) -> None:
    lock = FolderLock(folder, "AsyncCheckpoint(dirpath={!r})")
    lock.acquire()
    lock.release()


def _tell(dirpath: str, others: Sequence[Manifest], number: int) -> None:
    rank_zero_warn(
        f"AsyncCheckpoint(dirpath={dirpath!r}): holds checkpoints of another run, such as"
        f" {others[0].name!r} (step {others[0].step}), which stay; this run saves in"
        f" version_{number} there. To go on with the newest run, pass fit(ckpt_path='last'). To put"
        " this one in the place of what is there, set overwrite=True."
    )


def newest_of_places(places: Sequence[Folder]) -> tuple[Manifest, Folder] | None:
    """The newest whole checkpoint in the folders of a Trainer's callbacks, and where it is.

    Within a run the order is that of its saves. Which of several runs is newer the folder tells
    where both have saved in it, and else the time of their saves.

    Args:
        places: One for each callback; each may have versions.
    """
    whole = [newest for place in places if (newest := newest_of_versions(place)) is not None]
    if not whole:
        return None
    latest, _ = max(whole, key=lambda each: each[0].saved_at)
    of_run = [each for each in whole if each[0].metadata.get(RUN) == latest.metadata.get(RUN)]
    return max(of_run, key=lambda each: order_in_run(each[0]))


class BestOfEarlier:
    """The best checkpoint that an earlier process has saved, for ``ckpt_path="best"``.

    It is asked for several times in a row, and reads every byte: once, while nothing changes.
    """

    def __init__(self) -> None:
        self._seen: Any = None
        self._path = ""

    def path(self, folder: Folder, monitor: str | None, mode: str) -> str:
        """Path of the best whole one of the newest run, or an empty string.

        Args:
            folder: That its run was given.
            monitor: Name of the value that ranks; without, the newest is best.
            mode: Whether the ``min`` or the ``max`` value is best.
        """
        every = ((here, committed_checkpoints(here)) for here in versions(folder).values())
        runs = [(here, found) for here, found in every if found]
        asked = ([found for _, found in runs], monitor, mode)
        if asked != self._seen:
            self._seen, self._path = asked, ""
            if runs:
                here, found = max(runs, key=lambda run: run[1][0].order)
                best = newest_whole(here) if monitor is None else _best(here, found, monitor, mode)
                self._path = here.path(best.name + DATA) if best is not None else ""
        return self._path


def _best(folder: Folder, found: list[Manifest], monitor: str, mode: str) -> Manifest | None:
    """Of equal values the one that was committed first, as ModelCheckpoint has it."""
    newest, sign = found[0], 1.0 if mode == "min" else -1.0
    left = {*newest.abandoned, *withdrawn_names(folder.names())}
    ranked = [
        (sign * each.metadata["score"], each.order, each)
        for each in found
        if each.metadata.get(RUN) == newest.metadata.get(RUN)
        and each.metadata.get("monitor") == monitor
        and each.metadata.get("score") is not None
        and each.name not in left
    ]
    best_first = (each for _, _, each in sorted(ranked, key=lambda one: one[:2]))
    return next((each for each in best_first if _is_whole(folder, each)), None)


def _is_whole(folder: Folder, manifest: Manifest) -> bool:
    try:
        verify(folder, manifest)
    except (ValueError, OSError) as error:
        path = folder.path(manifest.name + DATA)
        rank_zero_warn(f"AsyncCheckpoint: {path} is passed over as the best: {error}.")
        return False
    return True
