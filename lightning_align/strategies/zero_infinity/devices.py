"""Which of a model is on a drive and which in host memory, in DeepSpeed's words.

On a CPU ``"cpu"`` and ``"none"`` are one place. What is in host memory alone is used where it lies:
nothing of it is copied, and nothing of it outlives the process. Where a device computes, parameters
of ``"cpu"`` come and go there, and those of ``"none"`` stay. The optimizer's state is in host
memory for both words, as it is stepped there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lightning_align._errors import argument_error, check_choice
from lightning_align.offload.block import Block
from lightning_align.strategies.zero_infinity.blocks import WHERE

_DEVICES = ("nvme", "cpu", "none")


@dataclass(frozen=True)
class Devices:
    """Where parameters, gradients and optimizer state lie.

    Args:
        stage: 3 lets parameters come and go; 2 keeps them in memory, 1 gradients as well.
        params: ``"nvme"``, ``"cpu"`` or ``"none"``.
        optimizer: The same, of its state.
        fraction: Share of bytes that is on the drive, of what could be there.

    Raises:
        ValueError: If one of them is out of its range, or they exclude each other.
    """

    stage: int = 3
    params: str = "nvme"
    optimizer: str = "nvme"
    fraction: float = 1.0

    def __post_init__(self) -> None:
        check_choice(WHERE, "stage", self.stage, (1, 2, 3))
        check_choice(WHERE, "offload_params_device", self.params, _DEVICES)
        check_choice(WHERE, "offload_optimizer_device", self.optimizer, _DEVICES)
        if not 0 <= self.fraction <= 1:
            rule = "must be between 0 and 1: the share that is on the drive"
            raise argument_error(WHERE, "offload_fraction", self.fraction, rule)
        if self.fraction < 1 and "nvme" not in (self.params, self.optimizer):
            rule = "nothing is on a drive that a share of it could be"
            way_out = "Leave it out, or set offload_optimizer_device='nvme'"
            raise argument_error(WHERE, "offload_fraction", self.fraction, rule, way_out)

    @property
    def commits(self) -> bool:
        """Whether a whole step is on the drive, so that it outlives a kill."""
        return self.params == self.optimizer == "nvme" and self.fraction == 1

    @property
    def uses_drive(self) -> bool:
        """Whether anything is there."""
        return "nvme" in (self.params, self.optimizer) and self.fraction > 0

    def assign(self, blocks: Sequence[Block], ranks: int = 1, *, on_device: bool = False) -> None:
        """Say of each block what of it lies where.

        Of several ranks each has a section in host memory. The whole of it is put together for each
        use, and gradients are reduced to it.

        Args:
            blocks: All blocks, as ``find_blocks`` gives them.
            ranks: How many there are.
            on_device: Whether something else than the host computes.
        """
        chosen = spread([block.nbytes for block in blocks], self.fraction)
        for block, on_drive in zip(blocks, chosen, strict=True):
            belongs_to_none = block.kept
            block.is_stored = on_drive and self.params == "nvme"
            block.states_stay = not (on_drive and self.optimizer == "nvme")
            stays = belongs_to_none or self.stage < 3 or (on_device and self.params == "none")
            block.travels = on_device and not stays
            block.kept = stays or (ranks == 1 and not block.is_stored)
            stays = belongs_to_none or self.stage < 2
            block.gradients_stay = stays or (ranks == 1 and block.states_stay and not on_device)
            block.gradients_stay |= block.read_only  # of which there are none


def spread(sizes: Sequence[int], share: float) -> Iterator[bool]:
    """Choose items whose sizes sum up to a share of all, evenly spread over their order.

    So that what is read can be read while others, which are there, compute.

    Args:
        sizes: Of the items.
        share: Between 0 and 1.
    """
    seen = chosen = 0
    for size in sizes:
        seen += size
        takes = share > 0 and chosen + size / 2 <= share * seen
        chosen += size * takes
        yield takes
