"""Which samples become eligible when: difficulties and pacing, brought together as groups.

Samples that become eligible at the same step are a *group*. With one measure of difficulty the
groups lie one behind the other in its index, and nothing is copied. With several a sample is
eligible when all of them allow it, so groups are collected once (``intersection``).

What was eligible once stays eligible, also under a schedule that falls: so it is in DeepSpeed.

Shapes: N samples, L distinct difficulties, E steps at which a group joins, G groups.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice, pairwise
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from lightning_align._errors import argument_error
from lightning_align.data.feedback import SelfPaced
from lightning_align.data.intersection import intersected
from lightning_align.data.pacing import CurriculumScheduler

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Samples = NDArray[np.integer[Any]]

WHERE = "CurriculumSampler"
MOST_LEVELS = 1000
DIFFICULTY_TYPES = ("value", "percentile")


class SortedSamples(Protocol):
    """An index of samples by difficulty."""

    @property
    def levels(self) -> NDArray[Any]:
        """Distinct difficulties, ascending, (L,)."""
        ...

    @property
    def offsets(self) -> NDArray[np.int64]:
        """Where those of each difficulty begin in ``order``, and where the last end, (L + 1,)."""
        ...

    @property
    def order(self) -> Samples:
        """Samples by difficulty, (N,)."""
        ...


@dataclass(frozen=True)
class Levels:
    """The samples of a curriculum by groups.

    Args:
        samples: Samples, group after group, (N,); those that never become eligible come last.
        sizes: Number of samples of each group, (G,), all above 0.
        steps: Step at which each group becomes eligible, the first at 1.
    """

    samples: Samples
    sizes: NDArray[np.int64]
    steps: list[int]

    @property
    def never_eligible(self) -> int:
        """Number of samples that no step allows."""
        return len(self.samples) - int(self.sizes.sum())


def eligible_counts(
    name: str,
    index: SortedSamples,
    scheduler: CurriculumScheduler | SelfPaced,
    difficulty_type: str,
    at_most: int = MOST_LEVELS,
) -> list[tuple[int, int]]:
    """How many of an index's samples are eligible: pairs of a step and what holds from it on.

    Args:
        name: Name of the measure, for errors.
        index: The samples by difficulty.
        scheduler: Difficulty at a step.
        difficulty_type: Whether that is a ``"value"``, or a ``"percentile"`` of the samples: at
            ``max_difficulty`` all of them.
        at_most: Greatest number of pairs; a finer schedule is merged, with a warning.

    Raises:
        ValueError: If all samples are equally difficult, or the schedule counts tokens.
    """
    if len(index.levels) == 1:
        rule = f"all samples are equally difficult, {index.levels[0]}: they have no order"
        raise argument_error(WHERE, "difficulties", name, rule, "Train without, or by another one")
    if scheduler.unit != "step":
        rule = "which samples a batch has must follow from its number, and not from tokens"
        way_out = "Give it total_curriculum_step or max_step"
        raise argument_error(WHERE, "scheduler", name, rule, way_out)
    changes = [*islice(scheduler.changes(), at_most + 1)]
    if len(changes) > at_most:
        warnings.warn(
            f"{WHERE}(scheduler={name!r}): at most {at_most} levels are kept apart; finer ones "
            "are merged, so that samples join late, and never early",
            stacklevel=2,
        )
        last = scheduler.end - 1
        spaced = [1 + last * number // (at_most - 1) for number in range(at_most)]
        changes = [(step, scheduler.get_difficulty(step)) for step in spaced]
    steps, difficulties = zip(*changes, strict=True)
    num_samples, greatest = len(index.order), scheduler.max_difficulty
    if difficulty_type == "value":
        places = np.searchsorted(index.levels, np.array(difficulties), side="right")
        counts = index.offsets[places].tolist()
    else:  # DeepSpeed rounds a hundredth down first: of 99 samples it then has none
        counts = [
            num_samples if part >= greatest else int(num_samples * part // greatest)
            for part in difficulties
        ]
    rising = [*accumulate(counts, max)]
    fresh = (0, *(n for n, (before, now) in enumerate(pairwise(rising), 1) if now > before))
    return [(steps[n], rising[n]) for n in fresh]


def by_level(
    indices: Mapping[str, SortedSamples], counts: Mapping[str, Sequence[tuple[int, int]]]
) -> Levels:
    """The groups of samples that become eligible together, for one measure or several.

    Args:
        indices: For each measure, the samples by difficulty.
        counts: For each measure, how many are eligible from which step on.

    Raises:
        ValueError: If nothing is eligible at the first step.
    """
    steps = sorted({step for pairs in counts.values() for step, _ in pairs})
    if len(indices) == 1:
        (name,) = indices
        samples, totals = indices[name].order, [count for _, count in counts[name]]
        sizes = np.diff(totals, prepend=0)
    else:
        samples, sizes = intersected(indices, counts, steps)
    if sizes[0] == 0:
        least = ", ".join(f"{name} {index.levels[0]}" for name, index in indices.items())
        rule = f"no sample is eligible at the first step; the lowest there are: {least}"
        raise argument_error(WHERE, "scheduler", [*indices], rule, "Raise min_difficulty")
    joined = np.flatnonzero(sizes)
    return Levels(samples, sizes[joined], [steps[number] for number in joined])
