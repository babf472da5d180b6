"""Which checkpoint came from which, where a run went back and took another way.

Steps do not tell: trained to 100 and again from 40 to 60, a folder's newest is 60. Clocks of two
machines do not tell, either. So every commit is numbered, one more than any in the folder; it
names its parent, and the checkpoints that its run had left behind by going back.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from lightning_align.checkpointing.manifest import Manifest, newest_first


class Lineage:
    """What the next commit has to say of where it comes from, after those of its folder.

    Args:
        committed: Checkpoints in the folder.
        before: Number of the last commit that comes before them, in other folders.
    """

    def __init__(self, committed: Iterable[Manifest], before: int = 0) -> None:
        self._number = max((manifest.commit_number for manifest in committed), default=0)
        self._number = max(self._number, before)
        self._parent: str | None = None
        self._abandoned: set[str] = set()

    @property
    def abandoned(self) -> set[str]:
        """Names of those that the run has left behind by going back."""
        return self._abandoned

    def continue_from(
        self, name: str | None, step: int, committed: Mapping[str, Manifest]
    ) -> list[Manifest]:
        """Take note of the checkpoint that was loaded, and return those that are left by that.

        Args:
            name: Its name; None if it is in another folder, as of two callbacks that save a run.
            step: Its step: of a checkpoint that is elsewhere nothing else is known.
            committed: Checkpoints in the folder, by name.
        """
        parent = committed.get(name or "")
        if parent is not None:
            left = [found for found in committed.values() if found.order > parent.order]
        else:
            left = [found for found in committed.values() if found.step > step]
            before = (found for found in newest_first(committed.values()) if found.step <= step)
            parent = next(before, None)
        if parent is not None:
            left += [committed[each] for each in parent.abandoned if each in committed]
        self._parent = parent.name if parent is not None else None
        self._abandoned = {found.name for found in left}
        return list({found.name: found for found in left}.values())

    def withdraw(self, names: Iterable[str], committed: Mapping[str, Manifest]) -> None:
        """The run has gone back behind these, which may not all be committed yet.

        Args:
            names: Of these, and of those that were withdrawn before.
            committed: Checkpoints in the folder, by name.
        """
        if not (names := set(names)):
            return
        self._abandoned = self._abandoned | names
        kept = (found for name, found in committed.items() if name not in self._abandoned)
        parent = next(iter(newest_first(kept)), None)
        self._parent = parent.name if parent is not None else None

    def next(self, committed: Mapping[str, Manifest]) -> dict[str, Any]:
        """The entry of the next commit.

        Args:
            committed: Checkpoints in the folder, by name.
        """
        abandoned = sorted(self._abandoned & committed.keys())
        return {"commit": self._number + 1, "parent": self._parent, "abandoned": abandoned}

    def commit(self, manifest: Manifest) -> None:
        """Take note of a commit."""
        self._number = manifest.commit_number
        if manifest.name not in self._abandoned:
            self._parent = manifest.name
