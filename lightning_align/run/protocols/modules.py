"""What is asked of a LightningModule, and what the answer of one is that knows nothing of us."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from difflib import get_close_matches
from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn
from typing_extensions import Protocol, get_protocol_members, runtime_checkable

from lightning_align.losses import CompletionLogps, PreferenceOptions


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
class CountsMargins(Protocol):
    """When a step or an evaluation has ended, it knows how the margins of its pairs lie."""

    @property
    def margin_counts(self) -> Tensor | None:
        """Pairs between ``losses.margin_edges``, over window or evaluation and ranks, or None."""


@runtime_checkable
class ScoresPairs(Protocol):
    """It can score the pairs of a batch without anything else coming of it."""

    options: PreferenceOptions

    def score_pairs(self, batch: Any, /) -> tuple[CompletionLogps, CompletionLogps | None]:
        """Rows [chosen; rejected] under (policy, reference), as in its step."""


@runtime_checkable
class AsksReference(Protocol):
    """Its reference may be asked about texts that are not in the data."""

    @property
    def reference_refusal(self) -> str | None:
        """Why it cannot be, as the rule of an error; None if it can."""

    def as_reference(self) -> AbstractContextManager[nn.Module]:
        """A language model that says what the reference says, inside of the context."""


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
class ArrangesBatches(Protocol):
    """Some rows of its batches belong together, such as the two of a pair."""

    def pipeline_batch(self, batch: Any, /) -> Any:
        """The batch as its steps take it too, to be cut between any two rows of its tensors."""


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


# Questions


def window_sums(module: pl.LightningModule) -> dict[str, Tensor]:
    """Sums that a module collects over a window of accumulation, to be read and changed."""
    sums = module.accumulated if isinstance(module, SumsOverWindow) else None
    return sums if isinstance(sums, dict) else {}  # a module of one's own may mean something else


def frozen_modules(module: nn.Module) -> dict[str, nn.Module]:
    """Modules beside a module's own that take part in its step, by name."""
    return module.frozen_modules() if isinstance(module, HasFrozenModules) else {}


def arranged(module: nn.Module, batch: Any) -> Any:
    """A batch that micro-batches may be cut from."""
    return module.pipeline_batch(batch) if isinstance(module, ArrangesBatches) else batch


def loss_is_sum(module: pl.LightningModule) -> bool:
    """Whether the loss of a module's step is a sum over rows, and not a mean."""
    return isinstance(module, DeclaresReduction) and module.loss_reduction == "sum"


def misspelt(module: pl.LightningModule) -> dict[str, str]:
    """What a module has that no pipeline asks for, and the name that it may have meant."""
    kinds = (NamesLayers, NamesInputs, ArrangesBatches, WeighsMicrobatches, RefusesPipeline)
    asked = [name for kind in kinds for name in get_protocol_members(kind)]
    own = {*vars(module), *(name for base in type(module).__mro__ for name in vars(base))}
    # Other words than these with their prefix are too common to say anything.
    unknown = [name for name in sorted(own) if name.startswith("pipeline_") and name not in asked]
    near = {name: get_close_matches(name, asked, 1, cutoff=0.9) for name in unknown}
    return {name: found[0] for name, found in near.items() if found}
