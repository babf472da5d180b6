"""The sampler of a curriculum: a ``PositionSampler`` whose order is easy before hard."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np
from typing_extensions import override

from lightning_align._declared import declared
from lightning_align._errors import argument_error, check_choice, check_least
from lightning_align.data.batch_sizes import BatchSizes
from lightning_align.data.curriculum_order import CurriculumOrder
from lightning_align.data.difficulty import DifficultyIndex
from lightning_align.data.eligibility import (
    DIFFICULTY_TYPES,
    WHERE,
    SortedSamples,
    by_level,
    eligible_counts,
)
from lightning_align.data.feedback import SelfPaced, scheduler_of
from lightning_align.data.pacing import CurriculumScheduler
from lightning_align.data.sampler import PositionSampler
from lightning_align.data.self_paced_order import SelfPacedOrder
from lightning_align.data.skipped import SkippedBatches


@declared
class CurriculumSampler(PositionSampler):
    """Yields this rank's batches of samples that are not too difficult yet.

    Batch n, counted from 0, has the difficulty of step n + 1, as in DeepSpeed, and is a pure
    function of the seed and n. All batches are full: ``len`` of it is as many batches as hold every
    sample once. Alone it counts what it has yielded and goes on there; workers of a DataLoader are
    ahead of what was trained, so a resume needs ``position``, ``ExactResume`` or a loader that
    keeps the sampler's state itself.

    Args:
        difficulties: One number for each sample, or an index of them; for several measures a
            mapping from their names. A sample is eligible when all measures allow it.
        scheduler: A ``CurriculumScheduler`` or its configuration; for several measures a mapping
            with the same names. For one measure it may be ``SelfPaced``: batch n is then a function
            of its decisions, too.
        batch_size: Samples per batch and rank.
        seed: Seed of every order.
        num_replicas: Number of ranks that share a batch.
        rank: This process, counted from 0.
        difficulty_type: Whether the scheduler's numbers are a ``"value"`` or a ``"percentile"``;
            for several measures a mapping, or one for all.
        replacement: Draw every sample from all that are eligible, whatever came before; else those
            that became eligible together are seen equally often, or once more, at every moment.
        batch_sizes: Samples per batch and rank where they change with time; the last of them is
            ``batch_size``.
        position: Called once when an iteration starts; returns how many batches come before its
            first, those that are skipped not counted. By default what was yielded or, before the
            first, as many as the epochs have that were set.
        skipped: Called with ``position``; returns the batches to pass over, by their numbers.

    Attributes:
        order: The stream of samples: a ``CurriculumOrder``, or a ``SelfPacedOrder``.

    Raises:
        ValueError: If a difficulty is not finite or all are the same, names or sizes of measures
            differ, or no sample is eligible at the first step.

    Example:
        >>> linear = {"total_curriculum_step": 4, "difficulty_step": 1}
        >>> scheduler = {"min_difficulty": 1, "max_difficulty": 4, "schedule_type": "fixed_linear",
        ...              "schedule_config": linear}
        >>> sampler = CurriculumSampler([4, 3, 2, 1], scheduler, batch_size=1)
        >>> [sampler.difficulties_at(n)["difficulty"] for n in range(4)]
        [1, 2, 3, 4]
        >>> sampler.batch(0)
        [3]
    """

    order: CurriculumOrder | SelfPacedOrder

    def __init__(
        self,
        difficulties: Any,
        scheduler: Any,
        batch_size: int,
        seed: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
        *,
        difficulty_type: str | Mapping[str, str] = "value",
        replacement: bool = False,
        batch_sizes: BatchSizes | None = None,
        position: Callable[[], int] | None = None,
        skipped: Callable[[], SkippedBatches] = SkippedBatches,
    ) -> None:
        check_least(WHERE, 1, batch_size=batch_size, num_replicas=num_replicas)
        indices = {name: _index(name, part) for name, part in _named(difficulties).items()}
        several = isinstance(difficulties, Mapping)
        parts = scheduler if several else _named(scheduler, always=True)
        self.schedulers = {name: scheduler_of(part) for name, part in parts.items()}
        types = difficulty_type
        if not isinstance(types, Mapping):
            types = dict.fromkeys(indices, types)
        _check_names(indices, self.schedulers, types)
        paced = _self_paced(self.schedulers, batch_sizes)
        planned = {name: paced.undecided() for name in indices} if paced else self.schedulers
        counts = {
            name: eligible_counts(name, index, planned[name], types[name])
            for name, index in indices.items()
        }
        levels = by_level(indices, counts)
        # Every batch is full: a level may begin and end with any, so there are no passes to end.
        super().__init__(
            len(levels.samples),
            batch_size,
            seed=seed,
            num_replicas=num_replicas,
            rank=rank,
            position=position,
            skipped=skipped,
            batch_sizes=batch_sizes or BatchSizes([(0, batch_size)]),
        )
        if levels.sizes[0] < self.before(1):
            warnings.warn(
                f"{WHERE}(batch_size={batch_size}): {levels.sizes[0]} samples are eligible at the "
                f"first step, so that some come more than once in its batch of {self.before(1)}",
                stacklevel=2,
            )
        if paced is None:
            starts = [self.before(step - 1) for step in levels.steps]
            self.order = CurriculumOrder(levels, starts, seed, replacement=replacement)
        else:
            size = self.before(1)
            self.order = SelfPacedOrder(levels, paced, size, seed, replacement=replacement)

    @override
    def _place(self) -> tuple[int, SkippedBatches]:
        if self.position is not None:
            return super()._place()
        skipped = self.skipped()
        # Epochs that end early must not move a curriculum on: they count in a new process alone.
        return skipped.position_of(self.yielded or self.epoch * len(self)), skipped

    def difficulties_at(self, n: int) -> dict[str, Any]:
        """What each measure's schedule allows in global batch ``n``, by name."""
        return {name: part.get_difficulty(n + 1) for name, part in self.schedulers.items()}

    def num_eligible(self, n: int) -> int:
        """Number of samples that global batch ``n`` is drawn from."""
        return int(self.order.num_eligible[self.order.level(self.before(n))])

    def never_seen(self, n: int) -> dict[str, int]:
        """Samples that no batch before ``n`` had: those that are never eligible, and the others.

        Args:
            n: Number of a batch in the stream; what is passed over before it was not seen.
        """
        order, skipped = self.order, self.skipped()
        if skipped.skipped_before(n):  # no count says what else had their samples: drawn again
            drawn = np.zeros(len(order.levels.samples), dtype=bool)
            for kept in range(skipped.kept_before(n)):
                batch = skipped.position_of(kept)
                drawn[order.indices(self.before(batch), self.before(batch + 1))] = True
            unseen = int(order.num_eligible[-1] - drawn.sum())
        else:
            unseen = order.num_unseen(self.before(n))
        return {"never_eligible": order.levels.never_eligible, "not_drawn": unseen}

    @override
    def stream(self) -> dict[str, Any]:
        order, levels = self.order, self.order.levels
        some = levels.samples[:: max(1, len(levels.samples) >> 12)]
        facts = [levels.sizes.tolist(), order.plan(), some.tolist(), order.replacement]
        digest = hashlib.blake2b(json.dumps(facts).encode(), digest_size=8).hexdigest()
        return {**super().stream(), "curriculum": digest}


def _named(parts: Any, *, always: bool = False) -> dict[str, Any]:
    if isinstance(parts, Mapping) and not always:
        return dict(parts)
    return {"difficulty": parts}


def _index(name: str, part: Any) -> SortedSamples:
    is_index = all(hasattr(part, attribute) for attribute in ("levels", "offsets", "order"))
    if is_index:
        return cast("SortedSamples", part)
    return DifficultyIndex.of_values(part, name=name, where=WHERE)


def _self_paced(
    schedulers: Mapping[str, CurriculumScheduler | SelfPaced], batch_sizes: BatchSizes | None
) -> SelfPaced | None:
    """The scheduler that losses pace, if there is one.

    Raises:
        ValueError: If there are other measures or sizes beside it, which would move its levels.
    """
    paced = [name for name, each in schedulers.items() if isinstance(each, SelfPaced)]
    if not paced:
        return None
    if len(schedulers) > 1:
        rule = f"{paced[0]} is self-paced, and then it is the only measure: groups of samples join"
        rule += " at its decisions"
        raise argument_error(WHERE, "scheduler", sorted(schedulers), rule, "Leave the others out")
    if batch_sizes is not None:
        rule = "a self-paced order has batches of one size"
        raise argument_error(WHERE, "batch_sizes", batch_sizes.phases, rule, "Leave them out")
    found = schedulers[paced[0]]
    assert isinstance(found, SelfPaced)
    return found


def _check_names(
    indices: Mapping[str, SortedSamples],
    schedulers: Mapping[str, CurriculumScheduler | SelfPaced],
    types: Mapping[str, str],
) -> None:
    """Refuse measures that do not fit together.

    Raises:
        ValueError: If there are none, or names or numbers of samples differ.
    """
    if not indices:
        raise argument_error(WHERE, "difficulties", {}, "must have a measure")
    for argument, parts in (("scheduler", schedulers), ("difficulty_type", types)):
        if parts.keys() != indices.keys():
            rule = f"must have the names of the difficulties, {', '.join(indices)}"
            raise argument_error(WHERE, argument, sorted(parts), rule)
    for kind in types.values():
        check_choice(WHERE, "difficulty_type", kind, DIFFICULTY_TYPES)
    sizes = {name: len(index.order) for name, index in indices.items()}
    if len(set(sizes.values())) > 1:
        raise argument_error(WHERE, "difficulties", sizes, "must be of the same samples")
    if max(sizes.values()) >= 2**31:
        raise argument_error(WHERE, "difficulties", sizes, "must be of fewer than 2**31 samples")
    if not np.prod(list(sizes.values())):
        raise argument_error(WHERE, "difficulties", sizes, "must have a sample")
