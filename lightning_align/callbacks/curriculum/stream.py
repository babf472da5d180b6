"""What a Curriculum says of which samples a batch has: their order, how many, and of which corpora.

None of it is done here. The datamodule makes its sampler of what it is handed before its loaders
exist; what is read here is what was written down.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_align._errors import argument_error, check_choice
from lightning_align.callbacks.curriculum.length import WHERE, LengthPart
from lightning_align.data.batch_sizes import BatchSizes
from lightning_align.data.curriculum_sampler import CurriculumSampler
from lightning_align.data.data_efficiency import read_data_efficiency
from lightning_align.data.deepspeed_index import open_index
from lightning_align.data.difficulty import DifficultyIndex
from lightning_align.data.feedback import SelfPaced, scheduler_of
from lightning_align.data.mixture_schedule import MixtureSchedule
from lightning_align.data.pacing import CurriculumScheduler
from lightning_align.data.sampler import PositionSampler
from lightning_align.run.protocols import (
    FollowsCurriculum,
    datamodule_of,
    sample_tokens,
    told_stream,
)
from lightning_align.run.replicas import replica

_KEYS = {
    "order": ("difficulties", "scheduler", "difficulty_type", "replacement"),
    "batch_size": ("scheduler", "constant_tokens"),
    "mixture": ("steps", "weights", "interpolate"),
}
_DEEPSPEED = ("data_efficiency", "data_sampling")
_NOTICED = 1.1  # times as many eligible samples are another level of the loss


class StreamPart:
    """Which samples batches have.

    Args:
        order: ``difficulties`` (an index's path, an index, or one number for each sample; several
            by name), ``scheduler`` (likewise), and optionally ``difficulty_type`` and
            ``replacement``; or a DeepSpeed configuration with a block ``data_efficiency``; or
            ``sampler``, the CurriculumSampler of a loader of one's own.
        batch_size: ``scheduler``, whose difficulties are samples per batch and rank and end at the
            datamodule's; or ``constant_tokens: true``, as many tokens as rows that are truncated
            leave room for.
        mixture: ``steps`` (batches, the first 0), ``weights`` (by path, one for each step) and
            optionally ``interpolate``.

    Attributes:
        sampler: Of the run's stream, to be asked; of order alone before a run, None without.
        own: That of a loader of one's own, None if the datamodule makes one.

    Raises:
        ValueError: If a key is not known or missing, an index is damaged, or order and mixture
            both say which samples come.
    """

    def __init__(
        self,
        order: Mapping[str, Any] | None,
        batch_size: Mapping[str, Any] | None,
        mixture: Mapping[str, Any] | None,
    ) -> None:
        for name, given in {"order": order, "batch_size": batch_size, "mixture": mixture}.items():
            _check_keys(name, given)
        if order is not None and mixture is not None:
            rule = "an order says which samples come, and so do weights of corpora"
            way_out = "Order the samples of all corpora by one index, or leave one of them out"
            raise argument_error(WHERE, "order, mixture", [*order, *mixture], rule, way_out)
        self.own: CurriculumSampler | None = (order or {}).get("sampler")
        if self.own is not None and (batch_size or mixture):
            rule = "the sampler says how many samples a batch has, and which"
            way_out = "Give it batch_sizes"
            raise argument_error(WHERE, "order.sampler", type(self.own).__name__, rule, way_out)
        self._order = None if order is None or self.own is not None else _opened(order)
        self._deepspeed = any(key in (order or {}) for key in _DEEPSPEED)
        self._batch_size, self._mixture = batch_size, mixture
        self.sizes: BatchSizes | None = self.own.batch_sizes if self.own else None
        self._corpora: list[str] = []
        self.sampler: PositionSampler | None = self.own
        self._alone: PositionSampler | None = None
        if batch_size is not None and batch_size.get("scheduler") is None:
            check_choice(WHERE, "batch_size.constant_tokens", batch_size["constant_tokens"], [True])

    @property
    def is_empty(self) -> bool:
        """Whether nothing is said."""
        return not self.ordering

    @property
    def self_paced(self) -> SelfPaced | None:
        """The scheduler of the order, if losses pace it."""
        schedulers = [(self._order or {}).get("scheduler")]
        if self.own is not None:
            schedulers = [*self.own.schedulers.values()]
        return next((each for each in schedulers if isinstance(each, SelfPaced)), None)

    @property
    def ordering(self) -> list[str]:
        """Which arguments decide what samples a batch has."""
        order = self.own or self._order
        parts = {"order": order, "batch_size": self._batch_size, "mixture": self._mixture}
        return [name for name, part in parts.items() if part is not None]

    @property
    def keeps_tokens(self) -> bool:
        """Whether batches have as many samples as keep their tokens constant."""
        return self._batch_size is not None and "constant_tokens" in self._batch_size

    def set_up(self, trainer: Trainer, length: LengthPart | None) -> None:
        """Hand it all to the datamodule of a run, before its loaders exist, unless one has its own.

        Args:
            trainer: Whose datamodule it is.
            length: How rows are cut, for batches at constant tokens.

        Raises:
            ValueError: If there is no datamodule that follows, or one of the parts does not fit it.
        """
        if self.own is not None:
            return
        named = "order" if self._order else "batch_size" if self._batch_size else "mixture"
        data = following(trainer, named)
        options = dict(self._order or {})
        if self._deepspeed and trainer.accumulate_grad_batches > 1:
            rank_zero_warn(
                f"Curriculum: a step of DeepSpeed's has {trainer.accumulate_grad_batches} batches"
                " here, as so many are accumulated, and its schedules count batches: they are over"
                " so many times sooner. Multiply total_curriculum_step or max_step."
            )
        if self._batch_size is not None:
            self.sizes = self._sizes(trainer, length)
            options["batch_sizes"] = self.sizes
        if self._mixture is not None:
            options["mixture"] = self._weights(data.corpora)
        self.sampler = data.follow_curriculum(**options)

    def _sizes(self, trainer: Trainer, length: LengthPart | None) -> BatchSizes:
        assert self._batch_size is not None
        scheduler, ranks = self._batch_size.get("scheduler"), replica(trainer)[0]
        if scheduler is not None:
            if not isinstance(scheduler, CurriculumScheduler):
                scheduler = CurriculumScheduler(scheduler)
            cuts = length is not None and length.mode == "truncate"
            if cuts and scheduler.unit == "tokens":
                rule = "tokens of a sample change with its length"
                way_out = "Give total_curriculum_step or max_step"
                raise argument_error(WHERE, "batch_size.scheduler", "tokens", rule, way_out)
            tokens = sample_tokens(trainer)
            return BatchSizes.scheduled(scheduler, tokens_per_sample=tokens, num_replicas=ranks)
        if length is None or length.mode != "truncate":
            rule = "needs length with mode='truncate', whose rows leave room"
            way_out = "Reshaped rows have constant tokens by themselves; or give a scheduler"
            raise argument_error(WHERE, "batch_size.constant_tokens", True, rule, way_out)
        if isinstance(length.scheduler, SelfPaced):
            rule = "sizes of all batches must be known, and losses pace the length"
            way_out = "Take mode='reshape', or a schedule by steps"
            raise argument_error(WHERE, "batch_size.constant_tokens", True, rule, way_out)
        at_last: int = (told_stream(trainer) or {})["batch"] // ranks
        longest = length.schedule.distinct[-1]
        return BatchSizes.at_constant_tokens(length.scheduler, at_last * longest)

    def _weights(self, corpora: Mapping[str, int]) -> MixtureSchedule:
        """The weights in the order of the datamodule's corpora.

        Raises:
            ValueError: If they are of others.
        """
        assert self._mixture is not None
        weights: Mapping[str, Any] = self._mixture["weights"]
        if not corpora:
            rule = "the datamodule has no corpora with weights"
            way_out = "Give it paths with weights, which hold for the number of blocks of an epoch"
            raise argument_error(WHERE, "mixture", [*weights], rule, way_out)
        if {*weights} != {*corpora}:
            rule = f"must be by the datamodule's paths, {', '.join(corpora)}"
            raise argument_error(WHERE, "mixture.weights", [*weights], rule)
        steps = list(self._mixture["steps"])
        if any(len(weights[path]) != len(steps) for path in corpora):
            rule = f"must be one for each of the {len(steps)} steps"
            raise argument_error(WHERE, "mixture.weights", dict(weights), rule)
        by_step = [[weights[path][number] for path in corpora] for number in range(len(steps))]
        self._corpora = [*corpora]
        interpolate = bool(self._mixture.get("interpolate", False))
        return MixtureSchedule([*corpora.values()], by_step, steps, interpolate)

    # What batch n is

    def described(self, n: int) -> dict[str, Any]:
        """What is known of batch n, by name."""
        sampler = self.sampler or self._of_order_alone()
        found: dict[str, Any] = {}
        if self.sampler is not None:
            found["batch_size"] = self.sampler.before(n + 1) - self.sampler.before(n)
        if isinstance(sampler, CurriculumSampler):
            found["difficulty"] = sampler.difficulties_at(n)
            found["eligible"] = sampler.num_eligible(n) / len(sampler.order.levels.samples)
        if sampler is not None and isinstance(sampler.mixture, MixtureSchedule):
            weights = sampler.mixture.weights_at(n)
            found["weights"] = dict(zip(self._corpora, weights, strict=True))
        return found

    def _of_order_alone(self) -> PositionSampler | None:
        """What order says without a datamodule: levels follow from the number of a batch."""
        if self._alone is None and self._order is not None:
            self._alone = CurriculumSampler(batch_size=1, **self._order)
        return self._alone

    def scalars(self, n: int) -> dict[str, float]:
        """The same as numbers to log."""
        found: dict[str, float] = {}
        for name, value in self.described(n).items():
            parts = value if isinstance(value, Mapping) else {"": value}
            found |= {f"{name}/{part}" if part else name: each for part, each in parts.items()}
        return found

    def changes(self, before: int, n: int) -> Iterator[str]:
        """What is another level of the loss, by intent, in batch n than it was in another."""
        if self.sizes is not None and self.sizes.size(before) != self.sizes.size(n):
            yield f"batches of {self.sizes.size(n)} samples a rank"
        mixture: Any = self.sampler.mixture if self.sampler is not None else None
        # Weights that go over into others by and by are no step.
        steps = isinstance(mixture, MixtureSchedule) and not mixture.interpolate
        if steps and mixture.weights_at(before) != mixture.weights_at(n):
            yield "other weights of corpora"
        if isinstance(self.sampler, CurriculumSampler):
            eligible = (self.sampler.num_eligible(m) for m in (before, n))
            was, now = (math.floor(math.log(many, _NOTICED)) for many in eligible)
            if was != now:
                yield "harder samples"

    def unseen(self, n: int) -> str | None:
        """What no batch before n had, in words."""
        if not isinstance(self.sampler, CurriculumSampler):
            return None
        found = self.sampler.never_seen(n)
        return (
            f"{found['never_eligible']} samples were never eligible, and {found['not_drawn']}"
            " others never drawn"
        )


def following(trainer: Trainer, named: str) -> FollowsCurriculum:
    """The datamodule of a run, which makes its sampler of what it is handed.

    Args:
        trainer: Whose datamodule it is.
        named: What of a Curriculum is to be handed over.

    Raises:
        ValueError: If there is none that does.
    """
    data = datamodule_of(trainer)
    if isinstance(data, FollowsCurriculum):
        return data
    rule = "there is no datamodule that follows one"
    if data is not None:
        rule = f"{type(data).__name__} does not follow one"
    way_out = "Take one of ours, or give CurriculumSampler to a DataLoader of your own"
    raise argument_error(WHERE, named, "...", rule, way_out)


def _check_keys(name: str, given: Any) -> None:
    """Refuse what is not a mapping with the keys of a part.

    Raises:
        ValueError: If it is not.
    """
    if given is None:
        return
    if not isinstance(given, Mapping):
        raise argument_error(WHERE, name, given, "must be a mapping")
    if name == "order" and any(key in given for key in _DEEPSPEED):
        return
    if name == "order" and "sampler" in given:
        if len(given) > 1 or not isinstance(given["sampler"], CurriculumSampler):
            rule = "must be a CurriculumSampler, and it knows the rest"
            raise argument_error(WHERE, "order.sampler", [*given], rule)
        return
    if unknown := sorted(set(given) - set(_KEYS[name])):
        raise argument_error(WHERE, name, unknown, f"knows {', '.join(_KEYS[name])}")
    needed = {"order": _KEYS["order"][:2], "mixture": _KEYS["mixture"][:2]}.get(name, ())
    if missing := [key for key in needed if key not in given]:
        raise argument_error(WHERE, name, dict(given), f"needs {' and '.join(missing)}")
    if name == "batch_size" and len(given) != 1:
        raise argument_error(WHERE, name, dict(given), "needs one of scheduler and constant_tokens")


def _opened(order: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a CurriculumSampler, with every index opened."""
    if any(key in order for key in _DEEPSPEED):
        return _of_deepspeed(order)
    given = order["difficulties"]
    difficulties: Any = (
        {name: _index(name, part) for name, part in given.items()}
        if isinstance(given, Mapping)
        else _index("difficulty", given)
    )
    # Made once: all samplers of a run read the decisions of one scheduler.
    schedulers = _schedulers(order["scheduler"], several=isinstance(given, Mapping))
    return {**order, "difficulties": difficulties, "scheduler": schedulers}


def _schedulers(given: Any, *, several: bool) -> Any:
    if several and isinstance(given, Mapping):
        return {name: scheduler_of(part) for name, part in given.items()}
    return scheduler_of(given)


def _index(name: str, given: Any) -> DifficultyIndex:
    if isinstance(given, DifficultyIndex):
        return given
    if isinstance(given, (str, Path)):
        return open_index(given, where=WHERE, argument="order.difficulties")
    return DifficultyIndex.of_values(given, name=name, where=WHERE)


def _of_deepspeed(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same of DeepSpeed's configuration; what is not kept is named.

    Raises:
        ValueError: If it orders no samples.
    """
    read = read_data_efficiency(config)
    not_kept = dict(read.not_kept)
    if "seed" in config.get("data_efficiency", config):
        not_kept["seed"] = "the datamodule's seed"
    if not_kept:
        named = "; ".join(f"{key}: {instead}" for key, instead in not_kept.items())
        rank_zero_warn(f"Curriculum(order=...): of DeepSpeed's configuration is not kept {named}.")
    lengths = [name for name, metric in read.metrics.items() if not metric.orders_samples]
    if lengths:
        rule = "orders no samples: it says how long each is"
        raise argument_error(WHERE, "order", lengths, rule, "Give its schedule as length")
    return {
        "difficulties": {
            name: _index(name, metric.index_prefix) for name, metric in read.metrics.items()
        },
        "scheduler": {name: metric.scheduler for name, metric in read.metrics.items()},
        "difficulty_type": {name: m.difficulty_type for name, m in read.metrics.items()},
    }
