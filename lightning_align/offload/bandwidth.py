"""How many bytes a step moves, and how long it takes: arithmetic on sizes and rates.

A step has phases that follow each other: the forwards and backwards of its batches, and an update
where gradients have waited for something that looks at all of them. Inside a phase transfers and
arithmetic overlap, so that it takes as long as the longer of the two.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

FORWARD, BACKWARD, UPDATE = "forward", "backward", "update"
FLOPS_A_TOKEN = 6  # for each parameter: 2 forward, 4 backward; 2 more where blocks are recomputed


@dataclass(frozen=True)
class BlockBytes:
    """Sizes of what comes and goes together, in bytes.

    Attributes:
        parameters: Of its parameters.
        states: Of its optimizer's state, as far as that is on the drive.
        gradients: Of its gradients, if those that wait do so on the drive; otherwise 0.
        trains: Whether any of its parameters is updated.
        stays: Whether its parameters stay in memory.
        is_stored: Whether its parameters are on the drive, also if they stay in memory.
    """

    parameters: int
    states: int
    gradients: int
    trains: bool = True
    stays: bool = False
    is_stored: bool = True

    @property
    def stored(self) -> int:
        """Bytes of its parameters on the drive."""
        return self.parameters * self.is_stored


class Moved(NamedTuple):
    """Bytes that one rank moves.

    Attributes:
        read: From its drive.
        written: To its drive.
        exchanged: Received from other ranks.
    """

    read: float = 0.0
    written: float = 0.0
    exchanged: float = 0.0

    def plus(self, other: Moved) -> Moved:
        """Both."""
        return Moved(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))


class Bandwidth(NamedTuple):
    """Bytes a second of a drive that does one thing at a time, and of what connects ranks."""

    read: float
    write: float
    exchange: float = float("inf")


@dataclass(frozen=True)
class StepLayout:
    """What a step of one optimizer update is made of.

    Attributes:
        blocks: In the order in which the forward calls them; those that stay come first.
        resident: Blocks whose parameters are in memory at a time.
        batches: Forwards and backwards of the step.
        gradients_wait: Whether blocks are updated after the last backward instead of inside it.
        updates_wait: Whether those that come and go then wait for the next step's forward.
        activation_bytes: What each batch puts on the drive in forward and takes back in backward.
        ranks: Among which parameters, gradients and states are divided.
    """

    blocks: Sequence[BlockBytes]
    resident: int = 3
    batches: int = 1
    gradients_wait: bool = False
    updates_wait: bool = False
    activation_bytes: float = 0.0
    ranks: int = 1

    @property
    def training(self) -> list[BlockBytes]:
        """Blocks that are updated."""
        return [block for block in self.blocks if block.trains]


def misses(accesses: Iterable[int], memory: OrderedDict[int, None], count: int) -> Iterator[int]:
    """What must be fetched, where what was used longest ago makes room.

    Args:
        accesses: Numbers of what is used, one after the other.
        memory: What is there, in order of use; it is kept up to date.
        count: How many find room.
    """
    for number in accesses:
        if number not in memory:
            yield number
        memory[number] = None
        memory.move_to_end(number)
        while len(memory) > count:
            memory.popitem(last=False)


def fetches(layout: StepLayout) -> list[tuple[str, list[BlockBytes]]]:
    """Phases of a step in their order, with the blocks that each must fetch.

    Backward needs the blocks from the first on that trains. A step finds in memory what the one
    before has left there.
    """
    moving = [n for n, block in enumerate(layout.blocks) if not block.stays]
    trains = [n for n, block in enumerate(layout.blocks) if block.trains]
    backward = [n for n in reversed(moving) if n >= min(trains, default=len(layout.blocks))]
    phases = [(FORWARD, moving), (BACKWARD, backward)] * layout.batches
    if layout.gradients_wait:
        phases.append((UPDATE, [] if layout.updates_wait else [n for n in moving if n in trains]))
    memory: OrderedDict[int, None] = OrderedDict()
    for _ in range(2):  # the second step is like all that follow
        found = [
            (phase, [layout.blocks[n] for n in misses(used, memory, layout.resident)])
            for phase, used in phases
        ]
    return found


def gradient_bytes(layout: StepLayout) -> list[Moved]:
    """Bytes of gradients that the backward of each batch reads and writes.

    The sums of a window are read and written again by each of its batches; the last one of a
    window whose gradients do not wait uses them at once.
    """
    size = sum(block.gradients for block in layout.training)
    written = layout.batches - 1 + layout.gradients_wait
    return [Moved(size * (n > 0), size * (n < written)) for n in range(layout.batches)]


def update_bytes(blocks: Sequence[BlockBytes], *, gradients_wait: bool) -> Moved:
    """Bytes of updating blocks whose parameters are in memory.

    Args:
        blocks: Which ones.
        gradients_wait: Whether their gradients are read, too.
    """
    states = sum(block.states for block in blocks)
    gradients = sum(block.gradients for block in blocks) * gradients_wait
    return Moved(states + gradients, states + sum(block.stored for block in blocks))


def step_bytes(layout: StepLayout) -> list[tuple[str, Moved]]:
    """Phases of a step in their order, with the bytes that one rank moves in each.

    For AdamW in fp32 and many blocks, a parameter of a block costs 4 bytes for forward, 4 for
    backward, 8 of moments read and 12 written; 12 more where gradients wait, 8 if updates do, too;
    and 16 for each further batch.

    Args:
        layout: What the step is made of.
    """
    reduced = sum(block.parameters for block in layout.training if not block.stays)
    activations = layout.activation_bytes * layout.ranks  # each rank has its own
    gradients = iter(gradient_bytes(layout))
    found = []
    for phase, blocks in fetches(layout):
        gathered = sum(block.parameters for block in blocks)
        moved = Moved(sum(block.stored for block in blocks), 0.0, gathered)
        if phase == FORWARD:
            moved = moved.plus(Moved(written=activations))
        elif phase == BACKWARD:
            moved = moved.plus(Moved(activations, 0.0, reduced)).plus(next(gradients))
        found.append((phase, moved))
    waits = layout.gradients_wait
    late = [b for b in layout.training if waits and layout.updates_wait and not b.stays]
    others = [block for block in layout.training if block not in late]
    for number, updated in ((0, late), (-1, others)):
        phase, moved = found[number]
        found[number] = phase, moved.plus(update_bytes(updated, gradients_wait=waits))
    ranks = layout.ranks
    return [
        (phase, Moved(read / ranks, written / ranks, exchanged * (ranks - 1) / ranks))
        for phase, (read, written, exchanged) in found
    ]


def total(phases: Iterable[tuple[str, Moved]]) -> Moved:
    """Bytes of all phases."""
    found = Moved()
    for _, moved in phases:
        found = found.plus(moved)
    return found


def transfer_s(moved: Moved, bandwidth: Bandwidth) -> float:
    """Seconds that transfers take by themselves: reads and writes share the drive.

    Args:
        moved: What is transferred.
        bandwidth: Bytes a second.
    """
    drive = moved.read / bandwidth.read + moved.written / bandwidth.write
    return max(drive, moved.exchanged / bandwidth.exchange)


def step_s(
    phases: Iterable[tuple[str, Moved]],
    compute_s: dict[str, float],
    bandwidth: Bandwidth,
    overlap: float = 1.0,
) -> float:
    """Seconds of a step.

    Args:
        phases: What it moves, as ``step_bytes`` says.
        compute_s: Seconds of arithmetic in one phase, by its name; 0 where it is not there.
        bandwidth: Bytes a second.
        overlap: How much of the shorter of the two is hidden behind the longer, from 0 to 1.
    """
    seconds = 0.0
    for phase, moved in phases:
        pair = compute_s.get(phase, 0.0), transfer_s(moved, bandwidth)
        seconds += max(pair) + (1 - overlap) * min(pair)
    return seconds


def fresh_memory_s(layout: StepLayout, fresh: float) -> float:
    """Seconds of one backward's arithmetic that go into memory for gradients of blocks.

    Each gradient of a block that comes and goes is memory which the system gives anew, as large
    allocations are mapped by themselves (``glibc_memory``); training in memory takes what it has.
    Activations of 256 KiB and more cost the same, and are not known here.

    Args:
        layout: What a step is made of.
        fresh: Bytes a second that a core can touch for the first time, as measured.
    """
    return sum(block.parameters for block in layout.training if not block.stays) / fresh


def hiding_tokens(
    layout: StepLayout, parameters: float, bandwidth: Bandwidth, flops_per_s: float
) -> float:
    """Tokens a step of one rank from which on its arithmetic takes as long as its transfers.

    What is updated after the last backward has no arithmetic to hide behind and is left out.

    Args:
        layout: What a step is made of.
        parameters: How many the model has.
        bandwidth: Bytes a second.
        flops_per_s: Operations a second of one rank.
    """
    phases = [(phase, moved) for phase, moved in step_bytes(layout) if phase != UPDATE]
    seconds = transfer_s(total(phases), bandwidth)
    return seconds * flops_per_s / (FLOPS_A_TOKEN * parameters)


# What the paper says (arXiv:2104.07857, section 4; its equations are named, not numbered)


def efficiency(intensity: float, bandwidth: float, peak: float) -> float:
    """Its efficiency: the share of the peak that is left where nothing overlaps.

    Args:
        intensity: Operations for each byte that is moved.
        bandwidth: Bytes a second.
        peak: Operations a second.
    """
    return intensity * bandwidth / (intensity * bandwidth + peak)


def bandwidth_for(share: float, intensity: float, peak: float) -> float:
    """Bytes a second that leave a share of the peak: the efficiency, solved for the bandwidth."""
    return share / (1 - share) * peak / intensity


def parameter_intensity(tokens: float) -> float:
    """Operations a byte of parameters and gradients in half precision."""
    return tokens


def optimizer_intensity(tokens: float) -> float:
    """Operations a byte of optimizer states."""
    return tokens / 4


def activation_intensity(hidden_size: int, blocks_a_checkpoint: int = 1) -> float:
    """Operations a byte of activation checkpoints."""
    return 24.0 * hidden_size * blocks_a_checkpoint
