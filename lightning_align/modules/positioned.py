"""The data of a run has a position: batch n of training is a pure function of (seed, n).

The datamodule owns the position n: it hands it to the sampler, saves it with every checkpoint, and
refuses a checkpoint of a run whose batches were others.
"""

from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any
from weakref import ref

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_align._compat.lightning_quiet import NoBatches
from lightning_align._errors import argument_error, check_least
from lightning_align.data.curriculum_sampler import CurriculumSampler
from lightning_align.data.mixture import Mixture
from lightning_align.data.sampler import BatchDataset, PositionSampler
from lightning_align.data.skipped import SkippedBatches
from lightning_align.models.tokenizer_state import pack_tokenizer
from lightning_align.run.position import batches_consumed
from lightning_align.run.replicas import replica

Paths = str | Path | list[str]


class PositionedDataModule(pl.LightningDataModule):
    """What our datamodules have in common: loaders whose order follows the position of the run.

    A subclass sets ``train_dataset``, ``val_dataset`` and ``fingerprint`` in ``setup``, and
    ``train_mixture`` if its training samples are of corpora with weights.

    Args:
        batch_size: Samples per batch and rank.
        seed: Seed of the order of the training samples.
        num_workers: Processes that load batches; 0 loads them in the training process.
        val_fraction: Share of the samples to hold out; what is held out is a subclass's affair.

    Attributes:
        skipped: Training batches of the stream that are passed over; a number n is the first n.
        fingerprint: Tells the training samples of one run from those of another.
        train_sampler: Sampler of the latest training loader.

    Raises:
        ValueError: If ``batch_size`` is below 1, ``seed`` or ``num_workers`` is negative, or
            ``val_fraction`` is not in [0, 1).
    """

    length_refusal: str | None = None  # why rows of its batches cannot be cut

    @property
    def sample_tokens(self) -> int | None:
        """Tokens to predict of each training sample; None where samples differ."""
        return None

    def __init__(
        self, batch_size: int, seed: int, num_workers: int, val_fraction: float = 0.0
    ) -> None:
        super().__init__()
        check_least(self._name, 1, batch_size=batch_size)
        check_least(self._name, 0, seed=seed, num_workers=num_workers)
        if not 0 <= val_fraction < 1:
            rule = "must be in [0, 1)"
            raise argument_error(self._name, "val_fraction", val_fraction, rule)
        self.batch_size = batch_size
        self.seed = seed
        self.num_workers = num_workers
        self.val_fraction = val_fraction
        self._skipped = SkippedBatches()
        self._skipped_by: tuple[ref[pl.Trainer] | None, SkippedBatches] = (None, SkippedBatches())
        self.tokenizer: Any = None
        self.fingerprint = ""
        self.train_dataset: BatchDataset | None = None
        self.val_dataset: BatchDataset | None = None
        self.train_mixture: Mixture | None = None
        self.train_sampler: PositionSampler | None = None
        # Of a curriculum: in which Trainer, options of the sampler, and what tells its stream.
        self._curriculum: tuple[ref[pl.Trainer] | None, dict[str, Any], Any] = (None, {}, None)
        self._packed_tokenizer: tuple[Any, dict[str, Any]] = (None, {})

    @property
    def skipped(self) -> SkippedBatches:
        """Training batches of the stream that are passed over.

        What is set while a Trainer fits is of its run: in another Trainer it counts no longer.
        """
        run, ranges = self._skipped_by
        return ranges if run is not None and run() is self.trainer else self._skipped

    @skipped.setter
    def skipped(self, value: SkippedBatches | int | Iterable[Iterable[int]]) -> None:
        if self.trainer is not None and self.trainer.state.status == TrainerStatus.RUNNING:
            self._skipped_by = ref(self.trainer), SkippedBatches.of(value)
        else:
            self._skipped, self._skipped_by = SkippedBatches.of(value), (None, SkippedBatches())

    @property
    def batch_keys(self) -> frozenset[str]:
        """Names in a batch, after ``setup``."""
        assert self.train_dataset is not None, "setup() comes first"
        # Two samples: a record is joined by the completion of another one.
        return frozenset(self.train_dataset[list(range(min(2, len(self.train_dataset))))])

    @property
    def position(self) -> int:
        """Number in the stream of the training batch that comes next."""
        return self.skipped.position_of(self._consumed)

    @property
    def _consumed(self) -> int:
        return batches_consumed(self.trainer) if self.trainer is not None else 0

    @override
    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Batches of the training stream, from the position onwards."""
        assert self.train_dataset is not None, "setup() comes first"
        sampler = self._train_sampler(position=lambda: self._consumed, skipped=lambda: self.skipped)
        self.train_sampler = sampler
        return self._loader(self.train_dataset, sampler)

    def _train_sampler(self, **follow: Any) -> PositionSampler:
        assert self.train_dataset is not None
        options = {"seed": self.seed, "mixture": self.train_mixture, **follow, **self._options}
        if "difficulties" not in options:
            return self._sampler(self.train_dataset, **options)
        options["num_replicas"], options["rank"] = self._replicas
        del options["mixture"]
        return CurriculumSampler(batch_size=self.batch_size, **options)

    _cuts_documents = False

    @property
    def corpora(self) -> dict[str, int]:
        """Training samples of each corpus that has a weight, by name; none without weights."""
        return {}

    def follow_curriculum(self, **options: Any) -> PositionSampler:
        """Cut the training batches of this fit from another stream of the same samples.

        To be called between ``setup`` and the making of the training loader. What is handed over
        decides which samples batch n holds, so a resume with anything else is refused.

        Args:
            **options: Of ``PositionSampler`` (``batch_sizes``, ``mixture``), of
                ``CurriculumSampler`` with ``difficulties``, or of ``BucketSampler`` with
                ``buckets``.

        Returns:
            A sampler of that stream, to be asked and not iterated over.

        Raises:
            ValueError: If an index is of other samples, or they are of corpora with weights.
        """
        assert self.train_dataset is not None, "setup() comes first"
        if "buckets" in options and not self._cuts_documents:
            rule = f"{self._name} has no documents that can be cut"
            raise argument_error("Curriculum", "length.mode", "bucket", rule, "Give TextDataModule")
        found = options.get("difficulties", {})
        for index in found.values() if isinstance(found, Mapping) else [found]:
            where = ("Curriculum", "order.difficulties")
            index.check_data(*where, len(self.train_dataset), self.fingerprint or None)
        if found and self.train_mixture is not None:
            rule = f"{self._name} mixes corpora by weight, and an order says which samples come"
            way_out = "Give paths without weights, or mixture in the place of order"
            raise argument_error("Curriculum", "order", [*self.corpora], rule, way_out)
        self._curriculum = (None if self.trainer is None else ref(self.trainer), options, None)
        sampler = self._train_sampler(skipped=lambda: self.skipped)
        self._curriculum = (*self._curriculum[:2], sampler.stream())
        return sampler

    @property
    def _options(self) -> dict[str, Any]:
        """What the sampler of this fit is told by a curriculum; in another Trainer nothing."""
        run, options, _ = self._curriculum
        return options if (None if run is None else run()) is self.trainer else {}

    @override
    def val_dataloader(self) -> DataLoader[dict[str, Tensor]] | list[Any]:
        """The held-out samples in their order, each once over all ranks; [] if there are none."""
        if self.val_dataset is None:
            return NoBatches()
        return self._loader(self.val_dataset, self._sampler(self.val_dataset, shuffle=False))

    @override
    def test_dataloader(self) -> DataLoader[dict[str, Tensor]] | list[Any]:
        """The held-out samples, as for validation."""
        return self.val_dataloader()

    @override
    def predict_dataloader(self) -> DataLoader[dict[str, Tensor]] | list[Any]:
        """The held-out samples, as for validation."""
        return self.val_dataloader()

    @override
    def state_dict(self) -> dict[str, Any]:
        """Where the run stands in which stream of batches, and the tokenizer of that stream."""
        state = {"position": self.position, "skipped": self.skipped.plain(), **self.stream}
        return state | ({"tokenizer": packed} if (packed := self._tokenizer_state()) else {})

    def _tokenizer_state(self) -> dict[str, Any]:
        """The tokenizer as plain data, made once: a vocabulary is megabytes of text."""
        tokenizer = self.tokenizer
        if tokenizer is None:
            return {}
        if self._packed_tokenizer[0] is not tokenizer:
            name = self.hparams.get("tokenizer")
            name = name if isinstance(name, str) else None
            self._packed_tokenizer = (tokenizer, pack_tokenizer(tokenizer, name))
        return self._packed_tokenizer[1]

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the stream of a checkpoint.

        Lightning restores the number of consumed batches by itself.

        Raises:
            ValueError: If training would go on with other batches than those of the checkpoint.
        """
        if self.trainer is not None and self.trainer.state.fn != TrainerFn.FITTING:
            return  # a checkpoint may be evaluated on any data
        way_out = "Resume with the same data and settings, or start a new run from the weights"
        ours = self.stream
        if self.trainer is not None:
            ours.setdefault("curriculum", None)
        for argument, value in ours.items():
            saved = state_dict.get(argument)
            # Before setup (load_from_checkpoint) the fingerprint is unknown. Fitting asks again.
            if saved != value and value != "":
                rule = f"the checkpoint's run has {saved!r}"
                raise argument_error(self._name, argument, value, rule, way_out)
        # Once a number k, which was added to every position: as if the first k were passed over.
        self.skipped = state_dict["skipped"]

    @property
    def stream(self) -> dict[str, Any]:
        """All that decides which samples batch n holds, over all ranks."""
        batch = self.batch_size * self._replicas[0]
        found = {"seed": self.seed, "batch": batch, "fingerprint": self.fingerprint}
        return found | ({"curriculum": self._curriculum[2]} if self._options else {})

    @property
    def _name(self) -> str:
        return type(self).__name__

    @property
    def _replicas(self) -> tuple[int, int]:
        """Number of ranks that share a batch, and this one's number among them."""
        # The strategy's own word, not the world size: ranks that hold parts of one model see the
        # same samples.
        return replica(self.trainer) if self.trainer is not None else (1, 0)

    def _sampler(self, dataset: BatchDataset, **options: Any) -> PositionSampler:
        options["num_replicas"], options["rank"] = self._replicas
        return PositionSampler(len(dataset), self.batch_size, **options)

    def _loader(
        self, dataset: BatchDataset, sampler: PositionSampler
    ) -> DataLoader[dict[str, Tensor]]:
        trainer = self.trainer
        overfit = getattr(trainer, "overfit_batches", 0)
        if overfit:
            rule = f"replaces the sampler, and {self._name} needs its own"
            way_out = "Set limit_train_batches, or give a small file"
            raise argument_error("Trainer", "overfit_batches", overfit, rule, way_out)
        on_cuda = trainer is not None and trainer.strategy.root_device.type == "cuda"
        return DataLoader(
            dataset,  # type: ignore[arg-type]  # torch only ever indexes it
            sampler=sampler,
            batch_size=None,  # the sampler's items are batches
            num_workers=self.num_workers,
            pin_memory=on_cuda,
        )


def plain_paths(where: str, argument: str, paths: Paths) -> list[str]:
    """``paths`` as a list of plain text: a checkpoint loads with ``weights_only=True``.

    Args:
        where: Class the user called.
        argument: Name of the argument that holds ``paths``.
        paths: One or several of them.

    Raises:
        ValueError: If one is no path, such as a dataset or records in memory.
    """
    listed: Any = paths if isinstance(paths, (list, tuple)) else [paths]
    for path in listed:
        if not isinstance(path, (str, PathLike)):
            rule = "must be paths, since a run that resumes reads its data again"
            way_out = "Name the folder that a dataset's save_to_disk has written, or a file"
            raise argument_error(where, argument, f"<{type(path).__name__}>", rule, way_out)
    return [str(path) for path in listed]
