"""Which preference losses, with which constants: one frozen object, checked when it is made.

A new option is a field here, and a word in ``READS`` for each loss that reads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, InitVar, dataclass, fields
from difflib import get_close_matches

from typing_extensions import TypedDict

from lightning_align._declared import declared
from lightning_align._errors import argument_error, check_choice, finite_number
from lightning_align.losses.divergences import DIVERGENCES

# Functions of one number for each pair, the margin of rewards.
_MARGIN = ("reference_free", "f_divergence_type", "f_alpha_divergence_coef", "length_alpha")
_PAIR = ("beta", "ld_alpha", "use_weighting")

# What each loss of pairs reads: options by name, and the "lengths". Without "reference_free" it has
# no reference. Lengths serve a margin loss only with length_alpha.
READS: dict[str, tuple[str, ...]] = {
    "alphapo": (*_PAIR, "label_smoothing", "simpo_gamma", "alphapo_alpha", "lengths"),
    "aot": ("beta", "ld_alpha", "reference_free", "label_smoothing"),
    "aot_unpaired": ("beta", "ld_alpha", "reference_free", "label_smoothing"),
    "apo_down": (*_PAIR, "reference_free"),
    "apo_zero": (*_PAIR, "reference_free"),
    "bco_pair": (*_PAIR, "reference_free"),
    "cdpo": (*_PAIR, *_MARGIN, "label_smoothing"),
    "cpo": (*_PAIR, "label_smoothing"),
    "discopop": (*_PAIR, *_MARGIN, "discopop_tau"),
    "exo_pair": (*_PAIR, *_MARGIN, "label_smoothing"),
    "hinge": (*_PAIR, *_MARGIN),
    "ipo": (*_PAIR, *_MARGIN, "lengths"),
    "nca_pair": (*_PAIR, "reference_free"),
    "orpo": (*_PAIR, "lengths"),
    "robust": (*_PAIR, *_MARGIN, "label_smoothing"),
    "sft": ("use_weighting", "sft_mean", "lengths"),
    "sigmoid": (*_PAIR, *_MARGIN),
    "sigmoid_norm": (*_PAIR, *_MARGIN, "lengths"),
    "simpo": (*_PAIR, "label_smoothing", "simpo_gamma", "lengths"),
    "sppo_hard": (*_PAIR, "reference_free"),
}

# The same of the losses of single completions, each with a label.
UNPAIRED_READS: dict[str, tuple[str, ...]] = {
    "apo_zero_unpaired": ("beta", "reference_free", "desirable_weight", "undesirable_weight"),
    "kto": ("beta", "reference_free", "desirable_weight", "undesirable_weight"),
}

# What is no constant of a loss.
_OF_NO_LOSS = ("loss_type", "loss_weights", "router_aux_loss_coef")

# Their pairs have no losses of their own, but the batch has one.
SORTED_LOSSES = frozenset({"aot", "aot_unpaired"})


@declared
@dataclass(frozen=True)
class PreferenceOptions:
    """Which preference losses, and their constants. Each loss takes what is its own.

    Args:
        loss_type: A name in ``LOSSES``, or several whose weighted sum is the loss: alphapo, aot,
            aot_unpaired, apo_down, apo_zero, bco_pair, cdpo, cpo, discopop, exo_pair, hinge, ipo,
            nca_pair, orpo, robust, sft, sigmoid, sigmoid_norm, simpo, sppo_hard; or one of
            unpaired records: apo_zero_unpaired, kto.
        beta: Strength of the pull to the reference; IPO's tau, ORPO's lambda.
        label_smoothing: Probability that a preference is the wrong way round, for alphapo, aot,
            aot_unpaired, cdpo, cpo, exo_pair, robust and simpo.
        loss_weights: Weight of each loss of a list; None for 1 each.
        f_divergence_type: What is held small between policy and reference: reverse_kl, forward_kl,
            js_divergence or alpha_divergence; others than the first only with losses of the margin.
        f_alpha_divergence_coef: Alpha of alpha_divergence; 1 is reverse_kl.
        ld_alpha: LD-DPO: weight of the log-probabilities of the tokens by which a completion is
            longer than the other one of its pair, in [0, 1]; None for 1.
        length_alpha: R-DPO: added to the margin of rewards for each token that the chosen
            completion is longer than the rejected one.
        use_weighting: WPO: weigh each pair by the policy's probability of both completions.
        reference_free: Whether the reference gives all completions the same probability.
        discopop_tau: Temperature of discopop's mixture.
        simpo_gamma: Margin of rewards that simpo and alphapo want.
        alphapo_alpha: Shape of alphapo's reward, (1 - p^-alpha) / alpha; 0 for simpo's, log p.
        sft_mean: Of sft, the mean over all chosen "tokens" of a batch, as in TRL, or over "pairs"
            of each one's own mean.
        desirable_weight: Weight of records whose label is true, for losses of unpaired records.
        undesirable_weight: Weight of the other ones.
        router_aux_loss_coef: Weight of the load-balancing loss of a mixture of experts; None for
            what the model's configuration says.
        where: Class or function the user called, for the message of an error.

    Raises:
        ValueError: If a loss is unknown, a number outside its range, weights do not fit the losses,
            or a loss cannot be had with an option: an f-divergence for another loss than one of the
            margin, exo_pair without smoothing, a weighting of aot.

    Example:
        >>> PreferenceOptions(loss_type="cdpo", label_smoothing=0.1).beta
        0.1
    """

    loss_type: str | Sequence[str] = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0
    _: KW_ONLY
    loss_weights: Sequence[float] | None = None
    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    ld_alpha: float | None = None
    length_alpha: float = 0.0
    use_weighting: bool = False
    reference_free: bool = False
    discopop_tau: float = 0.05
    simpo_gamma: float = 0.5
    alphapo_alpha: float = 0.25
    sft_mean: str = "tokens"
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    router_aux_loss_coef: float | None = None
    where: InitVar[str] = "PreferenceOptions"

    def __post_init__(self, where: str) -> None:
        self._check_losses(where)
        self._check_numbers(where)
        self._check_together(where)
        for name in ("loss_type", "loss_weights"):
            value = getattr(self, name)
            if isinstance(value, Sequence) and not isinstance(value, str):
                object.__setattr__(self, name, tuple(value))  # a list could change later

    @property
    def loss_types(self) -> tuple[str, ...]:
        """Names of all losses."""
        return (self.loss_type,) if isinstance(self.loss_type, str) else tuple(self.loss_type)

    @property
    def weights(self) -> tuple[float, ...]:
        """Weight of each of ``loss_types``."""
        given = self.loss_weights
        return (1.0,) * len(self.loss_types) if given is None else tuple(given)

    @property
    def is_unpaired(self) -> bool:
        """Whether the losses are of single completions with a label."""
        return self.loss_types[0] in UNPAIRED_READS

    @property
    def needs_reference(self) -> bool:
        """Whether any of the losses compares with a reference."""
        return not self.reference_free and bool(self.losses_that_read("reference_free"))

    @property
    def coupled_losses(self) -> list[str]:
        """Those of the losses that are functions of a whole batch, not means over its pairs."""
        by_tokens = {"sft"} if self.sft_mean == "tokens" else set()
        return [name for name in self.loss_types if name in SORTED_LOSSES | by_tokens | {"kto"}]

    def losses_that_read(self, name: str) -> list[str]:
        """Those of the losses that read an option, or the lengths."""
        return [loss for loss in self.loss_types if name in (READS | UNPAIRED_READS)[loss]]

    def refuse_idle(self, where: str) -> None:
        """Refuse what has been set and would do nothing.

        Args:
            where: Class the user called.

        Raises:
            ValueError: If an option differs from its default and none of the losses reads it.
        """
        for option in fields(self):
            name, value = option.name, getattr(self, option.name)
            if name in _OF_NO_LOSS or value == option.default:
                continue
            of, way_out = f"loss_type={self.loss_type!r}", ""
            if not self.losses_that_read(name):
                readers = sorted(loss for loss, read in ALL_READS.items() if name in read)
                way_out = f"Use {' or '.join(map(repr, readers))}"
            elif name == "f_alpha_divergence_coef" and self.f_divergence_type != "alpha_divergence":
                of = f"f_divergence_type={self.f_divergence_type!r}"
                way_out = "Use 'alpha_divergence'"
            if way_out:
                rule = f"must be {option.default!r} with {of}, which has none"
                raise argument_error(where, name, value, rule, way_out)

    def _check_losses(self, where: str) -> None:
        names = list(self.loss_types)
        if not names:
            raise argument_error(where, "loss_type", self.loss_type, "must name at least one loss")
        for name in names:
            if name not in ALL_READS:
                near = get_close_matches(str(name).lower(), ALL_READS, n=1)
                rule = f"must be one of {', '.join(map(repr, ALL_READS))}"
                way_out = f"The nearest is {near[0]!r}" if near else ""
                raise argument_error(where, "loss_type", self.loss_type, rule, way_out)
        if len(set(names)) < len(names):
            rule = "must name each loss once"
            raise argument_error(where, "loss_type", self.loss_type, rule, "Use loss_weights")
        if len(names) > 1 and not UNPAIRED_READS.keys().isdisjoint(names):
            rule = f"losses of unpaired records, {' and '.join(UNPAIRED_READS)}, stand alone"
            raise argument_error(where, "loss_type", self.loss_type, rule)
        given = self.loss_weights
        if given is None:
            return
        if len(given) != len(names):
            rule = f"must have one weight for each loss of loss_type={self.loss_type!r}"
            raise argument_error(where, "loss_weights", given, rule)
        if any(finite_number(weight) is None for weight in given) or not any(given):
            rule = "must be finite numbers, not all 0"
            raise argument_error(where, "loss_weights", given, rule)

    def _check_numbers(self, where: str) -> None:
        for name in ("beta", "discopop_tau"):
            if (finite_number(getattr(self, name)) or 0) <= 0:
                rule = "must be positive and finite"
                raise argument_error(where, name, getattr(self, name), rule)
        for name in (
            "f_alpha_divergence_coef",
            "length_alpha",
            "simpo_gamma",
            "alphapo_alpha",
            "desirable_weight",
            "undesirable_weight",
        ):
            value = finite_number(getattr(self, name))
            if value is None or (value < 0 and "weight" in name):
                rule = "must be a finite number" + ", not negative" * ("weight" in name)
                raise argument_error(where, name, getattr(self, name), rule)
        if not 0 <= self.label_smoothing < 0.5:
            rule = "must be in [0, 0.5)"
            raise argument_error(where, "label_smoothing", self.label_smoothing, rule)
        if self.ld_alpha is not None and not 0 <= self.ld_alpha <= 1:
            raise argument_error(where, "ld_alpha", self.ld_alpha, "must be None or in [0, 1]")
        check_choice(where, "f_divergence_type", self.f_divergence_type, DIVERGENCES)
        check_choice(where, "sft_mean", self.sft_mean, ("tokens", "pairs"))

    def _check_together(self, where: str) -> None:
        """What a loss cannot be had with: it would mean something else, or nothing."""
        names = self.loss_types
        if "exo_pair" in names and self.label_smoothing == 0:
            rule = "must be above 0 with exo_pair, whose target it is"
            raise argument_error(where, "label_smoothing", 0.0, rule, "The paper takes 1e-3")
        if self.f_divergence_type != "reverse_kl":
            able = [loss for loss, read in READS.items() if "f_divergence_type" in read]
            unable = [name for name in names if name not in (*able, "sft")]
            if unable:
                rule = (
                    f"must be 'reverse_kl' with {' and '.join(map(repr, unable))}: the constant of"
                    " the prompt cancels only in the margin of a pair"
                )
                way_out = f"Losses of the margin are {', '.join(able)}"
                value = self.f_divergence_type
                raise argument_error(where, "f_divergence_type", value, rule, way_out)
        if self.use_weighting:
            unable = [name for name in names if "use_weighting" not in ALL_READS[name]]
            if unable:
                rule = (
                    f"must be False with {' and '.join(map(repr, unable))}, which has no loss of a"
                    " pair that could be weighed"
                )
                raise argument_error(where, "use_weighting", True, rule)


class PreferenceArguments(TypedDict, total=False):
    """Arguments of ``PreferenceOptions`` as keywords of a function, for type checkers."""

    loss_type: str | Sequence[str]
    beta: float
    label_smoothing: float
    loss_weights: Sequence[float] | None
    f_divergence_type: str
    f_alpha_divergence_coef: float
    ld_alpha: float | None
    length_alpha: float
    use_weighting: bool
    reference_free: bool
    discopop_tau: float
    simpo_gamma: float
    alphapo_alpha: float
    sft_mean: str
    desirable_weight: float
    undesirable_weight: float
    router_aux_loss_coef: float | None


ALL_READS = READS | UNPAIRED_READS


def check_preference_arguments(
    where: str, loss_type: str, beta: float, label_smoothing: float
) -> None:
    """Refuse what ``DPOModule`` would refuse, for who wants to know it at construction.

    Args:
        where: Class or function the user called.
        loss_type: Key of ``LOSSES``.
        beta: Strength of the pull to the reference.
        label_smoothing: Probability that a preference is the wrong way round.

    Raises:
        ValueError: As ``PreferenceOptions``.
    """
    PreferenceOptions(loss_type, beta, label_smoothing, where=where).refuse_idle(where)
