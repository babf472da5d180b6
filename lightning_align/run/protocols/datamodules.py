"""What is asked of a LightningDataModule, and the answer of one that knows nothing, or of none."""

from collections.abc import Collection, Sequence
from typing import Any

import lightning.pytorch as pl
from typing_extensions import Protocol, runtime_checkable

from lightning_align.data.skipped import SkippedBatches


@runtime_checkable
class HasTokenizer(Protocol):
    """It has the tokenizer of its texts, or None until its set-up."""

    @property
    def tokenizer(self) -> Any:
        """A tokenizer of transformers."""


@runtime_checkable
class HasHeldOutPrompts(Protocol):
    """Some of its prompts are not trained on."""

    @property
    def held_out_prompts(self) -> Sequence[Sequence[int]]:
        """Tokens of each, once; none before its set-up."""


@runtime_checkable
class HasSeed(Protocol):
    """It has the seed of the run, unless ExactResume is given one."""

    @property
    def seed(self) -> int | None:
        """That seed; None leaves it open."""


@runtime_checkable
class SeparatesDocuments(Protocol):
    """It may say that no token of a packed block attends to another document."""

    @property
    def separate_documents(self) -> bool:
        """Whether it is so."""


class Began(Protocol):
    """A sampler that notes at which position an iteration of it began."""

    @property
    def start(self) -> int | None:
        """That position, None before the first."""


@runtime_checkable
class HasPosition(Protocol):
    """It knows which batch of the run comes next, and the sampler that was told so."""

    @property
    def train_sampler(self) -> Began | None:
        """Sampler of the latest training loader."""

    @property
    def position(self) -> int:
        """Number of that batch."""


@runtime_checkable
class SkipsBatches(Protocol):
    """Its position counts training batches that it passes over."""

    skipped: SkippedBatches


@runtime_checkable
class TellsStream(Protocol):
    """It says what decides which samples a training batch holds, over all ranks."""

    @property
    def stream(self) -> dict[str, Any]:
        """Plain data, the same wherever batch n is the same."""


@runtime_checkable
class FollowsCurriculum(Protocol):
    """It can cut its training batches from another stream of its samples."""

    @property
    def corpora(self) -> dict[str, int]:
        """Number of samples of each corpus that has a weight, by name and in order."""

    def follow_curriculum(self, **options: Any) -> Any:
        """Do so in this fit, with these options of its sampler; a sampler of it, to be asked."""


@runtime_checkable
class NumbersCompletions(Protocol):
    """Its batches carry the ``number`` of each sample, (P,)."""

    def completions(self) -> Sequence[Sequence[tuple[Any, Any]]]:
        """Prompt and completion ids of each row that a sample has in a batch, by its number."""


@runtime_checkable
class RefusesLength(Protocol):
    """Rows of its batches cannot be cut to a length, for this reason; None if they can."""

    @property
    def length_refusal(self) -> str | None:
        """The reason, as the rule of an error."""


@runtime_checkable
class TellsSampleTokens(Protocol):
    """Its training samples all have as many tokens to predict."""

    @property
    def sample_tokens(self) -> int | None:
        """How many; None if they differ."""


@runtime_checkable
class TellsBatchKeys(Protocol):
    """Its batches are mappings, and it says to what."""

    @property
    def batch_keys(self) -> Collection[str]:
        """Names in each batch, after its set-up."""


# Questions


def datamodule_of(trainer: pl.Trainer | None) -> Any:
    """The datamodule of a run, None without one; Lightning's types do not know of it."""
    return getattr(trainer, "datamodule", None)


def tokenizer_of(trainer: pl.Trainer | None) -> Any:
    """The tokenizer of a run's texts, None if nobody knows it."""
    data = datamodule_of(trainer)
    return data.tokenizer if isinstance(data, HasTokenizer) else None


def held_out_prompts(trainer: pl.Trainer) -> Sequence[Sequence[int]]:
    """Prompts that a run does not train on, none if nobody knows of any."""
    data = datamodule_of(trainer)
    return data.held_out_prompts if isinstance(data, HasHeldOutPrompts) else []


def seed_of(trainer: pl.Trainer) -> int | None:
    """The seed that a run's datamodule has, if any."""
    data = datamodule_of(trainer)
    return data.seed if isinstance(data, HasSeed) else None


def separates_documents(trainer: pl.Trainer) -> bool:
    """Whether tokens of a run's packed blocks attend to their own document only."""
    data = datamodule_of(trainer)
    return isinstance(data, SeparatesDocuments) and data.separate_documents


def began_elsewhere(trainer: pl.Trainer) -> bool:
    """Whether the training loader was started at another position than the run stands at."""
    data = datamodule_of(trainer)
    if not isinstance(data, HasPosition) or data.train_sampler is None:
        return False
    return data.train_sampler.start not in (None, data.position)


def sample_tokens(trainer: pl.Trainer) -> int | None:
    """Tokens to predict of each training sample of a run, None if nobody knows, or they differ."""
    data = datamodule_of(trainer)
    return data.sample_tokens if isinstance(data, TellsSampleTokens) else None


def length_refusal(trainer: pl.Trainer) -> str | None:
    """Why rows of a run's batches cannot be cut, if the datamodule says so."""
    data = datamodule_of(trainer)
    return data.length_refusal if isinstance(data, RefusesLength) else None


def datamodule_skips(trainer: pl.Trainer) -> SkipsBatches | None:
    """The datamodule of a run, if it passes over batches by itself."""
    data = datamodule_of(trainer)
    skips = isinstance(data, SkipsBatches) and isinstance(data.skipped, SkippedBatches)
    return data if skips else None


def told_stream(trainer: pl.Trainer) -> dict[str, Any] | None:
    """What the datamodule of a run says of its stream of batches, if it does."""
    data = datamodule_of(trainer)
    stream = data.stream if isinstance(data, TellsStream) else None
    return stream if isinstance(stream, dict) else None  # one's own may mean something else


def batch_keys(data: Any) -> Collection[str] | None:
    """Names in the batches of a datamodule, None if nobody knows."""
    found: Any = data.batch_keys if isinstance(data, TellsBatchKeys) else None
    is_told = isinstance(found, Collection) and not isinstance(found, str)
    return found if is_told else None  # one's own may mean something else
