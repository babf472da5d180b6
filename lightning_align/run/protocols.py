"""What strategies, modules, datamodules and callbacks ask each other.

A class answers by having the attribute or method: it need not inherit from the protocol, nor know
of us. Below the protocols stands a function for each question that has an answer for Lightning's
own classes, or one for all others. What is asked of optimizers is in ``optimizers/safety.py``.

``isinstance`` looks at the class and at what the object holds, without computing a property; it
takes microseconds, so it is asked at set-up and not in every step.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from difflib import get_close_matches
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch import strategies
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, Strategy
from torch import Tensor, nn
from typing_extensions import Protocol, get_protocol_members, runtime_checkable

from lightning_align._compat.lightning_trainer import wrap_in_ddp_again
from lightning_align.data.skipped import SkippedBatches
from lightning_align.run.callbacks import callbacks_of

# Of a LightningModule


@runtime_checkable
class SumsOverWindow(Protocol):
    """It collects sums over the open window of accumulation, which are saved with the gradients."""

    accumulated: dict[str, Tensor]


@runtime_checkable
class KnowsGradientFactor(Protocol):
    """Before the last backward of a window it knows by what it will multiply the gradients."""

    def gradient_factor(self) -> Tensor:
        """That factor, once the last step of the window has run; collective."""


@runtime_checkable
class CountsTokens(Protocol):
    """It counts and logs the tokens that it has learned from, over all ranks."""

    @property
    def tokens_seen(self) -> int:
        """Tokens so far."""


@runtime_checkable
class MeasuresSteps(Protocol):
    """When its ``on_before_optimizer_step`` has run, it knows what the window came to."""

    @property
    def measured_step(self) -> tuple[Tensor, Tensor] | None:
        """Mean loss and gradient norm, over window and ranks; None if no batch had a loss."""


@runtime_checkable
class ComputesBatchLoss(Protocol):
    """It can tell the loss of a batch without anything else coming of it."""

    def batch_loss(self, batch: Any, /) -> Tensor:
        """Mean loss, neither logged nor counted."""


@runtime_checkable
class HasFrozenModules(Protocol):
    """Modules that are not its submodules take part in its step."""

    def frozen_modules(self) -> dict[str, nn.Module]:
        """These modules by name."""


@runtime_checkable
class FillsFrozenModules(Protocol):
    """Its frozen modules may be built without values, which the strategy brings."""

    def frozen_copies(self) -> dict[str, str]:
        """Frozen modules that begin as copies, and the name of its submodule that each is of."""

    def frozen_modules_filled(self) -> None:
        """Called when their values are there, before they are put away."""


@runtime_checkable
class NumbersCompletions(Protocol):
    """A datamodule whose batches carry the ``number`` of each sample, (P,)."""

    def completions(self) -> Sequence[Sequence[tuple[Any, Any]]]:
        """Prompt and completion ids of each row that a sample has in a batch, by its number."""


@runtime_checkable
class DeclaresReduction(Protocol):
    """Its step's loss is a "sum" over the rows of a batch; without this a "mean"."""

    @property
    def loss_reduction(self) -> str:
        """Either of these words."""


@runtime_checkable
class NamesLayers(Protocol):
    """It says between which layers a pipeline may cut it."""

    def pipeline_layers(self) -> Sequence[nn.Module]:
        """Layers in the order of their calls."""


@runtime_checkable
class NamesInputs(Protocol):
    """Its first layer is called with something else than its step passes on."""

    def pipeline_inputs(self, batch: Any, /) -> Any:
        """The arguments of the first layer, a tuple if there are several."""


@runtime_checkable
class WeighsMicrobatches(Protocol):
    """Its step's loss is a mean over something else than the rows of a batch."""

    def pipeline_microbatch_weight(self, batch: Any, /) -> Tensor | float:
        """Over how many values the mean is."""


@runtime_checkable
class RefusesPipeline(Protocol):
    """Its batches cannot be cut into micro-batches, for this reason; an empty one is none."""

    @property
    def pipeline_refusal(self) -> str | None:
        """The reason, as the rule of an error."""


# Of a LightningDataModule


@runtime_checkable
class HasTokenizer(Protocol):
    """It has the tokenizer of its texts, or None until its set-up."""

    @property
    def tokenizer(self) -> Any:
        """A tokenizer of transformers."""


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


# Of a strategy


@runtime_checkable
class SpreadsModel(Protocol):
    """Its ranks hold parts of one model, whose parameters may be on meta until its set-up."""

    def total_grad_norm(self) -> Tensor:
        """Norm of the gradients of all parts; collective."""


@runtime_checkable
class HoldsGradients(Protocol):
    """It takes gradients out of ``p.grad`` as soon as they are there."""

    def scale_gradients(self, factor: Tensor, /) -> None:
        """Multiply all gradients of the open window."""

    def waiting_gradients(self) -> dict[str, Tensor]:
        """Copies of those that wait for their step, by name."""

    def put_gradients(self, gradients: Mapping[str, Tensor], /) -> set[str]:
        """Let gradients wait in the place of those that do; names of those that are taken."""


@runtime_checkable
class SnapshotsOwnPart(Protocol):
    """Each rank can take, and put back in mid-fit, what is its own of model and optimizer."""

    def snapshot_state(self) -> dict[str, Any]:
        """That part, under ``state_dict`` and ``optimizer_states``; not copied, nothing is sent."""

    def restore_state(self, state: Mapping[str, Any], /) -> None:
        """Put it back, on the rank that has taken it."""


@runtime_checkable
class SaysWhatStateTakes(Protocol):
    """A state that is held in mid-fit takes other memory than its tensors have, or none."""

    def state_nbytes(self) -> Mapping[str, int]:
        """Most bytes that one takes on this rank, by folder; "" is host memory."""


@runtime_checkable
class GathersState(Protocol):
    """It has to put the state of the module together."""

    def whole_state_dict(self) -> dict[str, Any]:
        """That state on rank 0, empty elsewhere; collective."""


@runtime_checkable
class SaysWhoSaves(Protocol):
    """It says whether rank 0 has the whole state when a checkpoint is written, or each its part."""

    @property
    def saves_whole_state(self) -> bool:
        """Whether rank 0 has it."""


@runtime_checkable
class SaysWhoRuns(Protocol):
    """It says whether rank 0 can call the model while the others wait."""

    @property
    def one_rank_runs_model(self) -> bool:
        """Whether it can."""


@runtime_checkable
class SaysHowParametersLie(Protocol):
    """It says whether optimizers get parameters in the shapes that the module gave them."""

    @property
    def keeps_shapes(self) -> bool:
        """Whether they do."""


@runtime_checkable
class FollowsFreezing(Protocol):
    """Parameters may be frozen and released between its steps."""

    def follow_freezing(self, dropped: Collection[nn.Parameter], /) -> None:
        """Take up what requires a gradient now, and forget the optimizer's state of ``dropped``."""


@runtime_checkable
class GathersParameters(Protocol):
    """Parameters are in memory only while a module is called, or while they are asked for."""

    def gathered(
        self, parameters: Collection[str | nn.Parameter] | None = None, *, modify: bool = False
    ) -> AbstractContextManager[None]:
        """Around code that reads parameters, or edits them: some, or all for None; collective."""


# Of callbacks


@runtime_checkable
class PlansChanges(Protocol):
    """What it does to a run moves loss or gradient norm to another level, by intent."""

    def planned_change(self, position: int, /) -> str | None:
        """What changes with the batch of this number, in a few words; None for nothing."""


@runtime_checkable
class CutsBatches(Protocol):
    """It makes another batch of each that the training loader yields, before anybody has it."""

    def cut_batch(self, batch: Any, number: int, /) -> Any:
        """That batch; ``number`` is the one of the stream, and all it may depend on beside it."""


@runtime_checkable
class ForgetsWindow(Protocol):
    """It counts what is learned; a LightningModule may be asked, too."""

    def forget_window(self) -> None:
        """Called before the step of a window that will not be taken: do not count it."""


@runtime_checkable
class HasStorageOptions(Protocol):
    """It passes these options to the filesystem of its ``dirpath``."""

    @property
    def storage_options(self) -> dict[str, Any] | None:
        """Options by name, as fsspec takes them."""


@runtime_checkable
class WithdrawsCheckpoints(Protocol):
    """It takes back what it has saved of a stretch that the run has gone back behind."""

    def withdraw(self, trainer: pl.Trainer, /) -> list[str]:
        """Do so; paths of these checkpoints, on rank zero. Collective."""


# Questions


def window_sums(module: pl.LightningModule) -> dict[str, Tensor]:
    """Sums that a module collects over a window of accumulation, to be read and changed."""
    sums = module.accumulated if isinstance(module, SumsOverWindow) else None
    return sums if isinstance(sums, dict) else {}  # a module of one's own may mean something else


def frozen_modules(module: nn.Module) -> dict[str, nn.Module]:
    """Modules beside a module's own that take part in its step, by name."""
    return module.frozen_modules() if isinstance(module, HasFrozenModules) else {}


def loss_is_sum(module: pl.LightningModule) -> bool:
    """Whether the loss of a module's step is a sum over rows, and not a mean."""
    return isinstance(module, DeclaresReduction) and module.loss_reduction == "sum"


def misspelt(module: pl.LightningModule) -> dict[str, str]:
    """What a module has that no pipeline asks for, and the name that it may have meant."""
    kinds = (NamesLayers, NamesInputs, WeighsMicrobatches, RefusesPipeline)
    asked = [name for kind in kinds for name in get_protocol_members(kind)]
    own = {*vars(module), *(name for base in type(module).__mro__ for name in vars(base))}
    # Other words than these with their prefix are too common to say anything.
    unknown = [name for name in sorted(own) if name.startswith("pipeline_") and name not in asked]
    near = {name: get_close_matches(name, asked, 1, cutoff=0.9) for name in unknown}
    return {name: found[0] for name, found in near.items() if found}


def datamodule_of(trainer: pl.Trainer | None) -> Any:
    """The datamodule of a run, None without one; Lightning's types do not know of it."""
    return getattr(trainer, "datamodule", None)


def forget_window(answers: Sequence[Any]) -> None:
    """Let nobody among module and callbacks count a window whose step will not be taken."""
    for each in answers:
        if isinstance(each, ForgetsWindow):
            each.forget_window()


def batch_cutter(trainer: pl.Trainer) -> Callable[[Any, int], Any] | None:
    """What a callback makes of each training batch, None if none does."""
    callbacks = callbacks_of(trainer)
    return next((each.cut_batch for each in callbacks if isinstance(each, CutsBatches)), None)


def tokenizer_of(trainer: pl.Trainer | None) -> Any:
    """The tokenizer of a run's texts, None if nobody knows it."""
    data = datamodule_of(trainer)
    return data.tokenizer if isinstance(data, HasTokenizer) else None


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


def saves_whole_state(strategy: Strategy) -> bool:
    """Whether rank 0 alone writes a checkpoint, of the whole state."""
    if isinstance(strategy, SaysWhoSaves):
        return strategy.saves_whole_state
    return type(strategy).save_checkpoint is Strategy.save_checkpoint


def whole_state_dict(strategy: Strategy) -> dict[str, Any] | None:
    """The module's state from a strategy that has to put it together; collective."""
    return strategy.whole_state_dict() if isinstance(strategy, GathersState) else None


def one_rank_runs_model(strategy: Strategy) -> bool:
    """Whether rank 0 can call the model while the others wait."""
    if isinstance(strategy, SaysWhoRuns):
        return strategy.one_rank_runs_model
    return has_replicas(strategy)


def keeps_shapes(strategy: Strategy) -> bool:
    """Whether optimizers get parameters in the shapes that the module gave them."""
    if isinstance(strategy, SaysHowParametersLie):
        return strategy.keeps_shapes
    return not isinstance(strategy, (DeepSpeedStrategy, strategies.FSDPStrategy))


def gathered(
    strategy: Strategy, parameters: Collection[nn.Parameter], *, modify: bool = False
) -> AbstractContextManager[None]:
    """Around code that reads or edits the values of parameters, wherever they are."""
    if isinstance(strategy, GathersParameters):
        return strategy.gathered(parameters, modify=modify)
    return nullcontext()


def may_freeze(strategy: Strategy) -> bool:
    """Whether parameters may be frozen and released between steps."""
    return isinstance(strategy, FollowsFreezing) or has_replicas(strategy)


def follow_freezing(trainer: pl.Trainer, dropped: Collection[nn.Parameter]) -> None:
    """Let strategy and optimizer take up what requires a gradient now; see ``FollowsFreezing``."""
    strategy = trainer.strategy
    if isinstance(strategy, FollowsFreezing):
        strategy.follow_freezing(dropped)
        return
    for optimizer in trainer.optimizers:
        for parameter in dropped:
            optimizer.state.pop(parameter, None)
    if isinstance(strategy, DDPStrategy):
        wrap_in_ddp_again(strategy, trainer.lightning_module)


def restores_in_fit(strategy: Strategy) -> bool:
    """Whether each rank has all of a state, or a part to itself, and can put it back in mid-fit."""
    return isinstance(strategy, SnapshotsOwnPart) or has_replicas(strategy)


def has_replicas(strategy: Strategy) -> bool:
    """Whether each rank has all of the model, where the module keeps it."""
    has = isinstance(strategy, (strategies.SingleDeviceStrategy, DDPStrategy))
    return has and not isinstance(strategy, DeepSpeedStrategy)  # a DDPStrategy by inheritance
