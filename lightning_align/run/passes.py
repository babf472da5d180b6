"""Where in which pass over its data a loader is, when batches of its stream are passed over.

An epoch of a plain loader is a pass over its data in an order of its own. The stream of a run is
what these passes yield one after the other, and a batch has the same number in it, the same pass
and the same draws whatever is passed over: the others stay what they would have been. An epoch
still trains as many batches as before, so that nothing that counts them moves: the loader goes on
into the next pass, and the next epoch from there. Only data without a length end an epoch where
they end, and the next one begins them anew.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from lightning_align.data.skipped import SkippedBatches
from lightning_align.run.position import Place


@dataclass
class EndedPasses:
    """Ends of the data, wherever batches had been passed over: no length says where they were.

    Args:
        ends: Of each end: the epoch that begins behind it, by how much the numbers of its passes
            are above those of the epochs, and how many batches had been passed over.
    """

    ends: list[tuple[int, int, int]] = field(default_factory=list)

    def before(self, epoch: int) -> tuple[int, int]:
        """Passes above the number of the epoch, and batches passed over in passes that ended."""
        return next((end[1:] for end in reversed(self.ends) if end[0] <= epoch), (0, 0))

    def note(self, epoch: int, passes: int, skipped: int) -> None:
        """Take down an end, unless it changes nothing."""
        if self.before(epoch) != (passes, skipped):
            self.ends.append((epoch, passes, skipped))

    def forget_behind(self, epoch: int) -> None:
        """Forget the ends of a stretch that is gone back behind."""
        self.ends = [end for end in self.ends if end[0] <= epoch]

    def plain(self) -> list[list[int]]:
        """The ends as plain data."""
        return [list(end) for end in self.ends]

    def load(self, plain: Iterable[Iterable[int]]) -> None:
        """Take up what ``plain`` gave."""
        self.ends = [(epoch, passes, skipped) for epoch, passes, skipped in plain]


@dataclass
class EpochStream:
    """The batches that one epoch trains, by their places in the passes of a run without skips.

    Args:
        epoch: Number of the epoch.
        trained: Batches that earlier epochs have trained.
        length: Batches of a pass, None where only its end tells.
        skipped: What is passed over.
        ended: Passes that have ended early.
    """

    epoch: int
    trained: int
    length: int | None
    skipped: SkippedBatches
    ended: EndedPasses

    def number(self, batch: int) -> int:
        """Number in the stream of the epoch's batch ``batch``."""
        return self.skipped.position_of(self.trained + batch)

    def place(self, batch: int) -> Place:
        """The pass and the place in it of the epoch's batch ``batch``."""
        passes, gone = self.ended.before(self.epoch) if self.skipped else (0, 0)
        ahead = self.number(batch) - self.trained - batch - gone
        if self.length and ahead:
            more, batch = divmod(batch + ahead, self.length)
            return Place(self.epoch + passes + more, batch)
        return Place(self.epoch + passes, batch + ahead)

    def behind(self, consumed: int) -> tuple[Place, int]:
        """Where the loader stands that has given ``consumed`` batches, and its next batch's number.

        What is passed over is passed over before the next batch, and not behind the last one. A new
        epoch begins its pass.
        """
        if consumed == 0:
            place = self.place(0)
            return Place(place.epoch, 0), self.number(0) - place.batch
        place = self.place(consumed - 1)
        return Place(place.epoch, place.batch + 1), self.number(consumed - 1) + 1

    def end_pass(self, number: int, batch: int) -> bool:
        """The data end before batch ``number``, the epoch's ``batch``; whether the epoch goes on.

        It does in the next pass, if it has trained none of this one.
        """
        passes, _ = self.ended.before(self.epoch)
        gone, goes_on = self.skipped.skipped_before(number), batch == 0
        self.ended.note(self.epoch + (not goes_on), passes + goes_on, gone)
        return goes_on
