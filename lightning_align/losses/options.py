"""Which preference loss, with which constants: one frozen object, checked when it is made.

A new option is a field here, and a word in ``READS`` for each loss that reads it; for all others it
must then stay at its default, so that no option is ignored without a word.
"""

from __future__ import annotations

from dataclasses import InitVar, dataclass, fields

from lightning_align._errors import argument_error, check_choice, finite_number

# What each loss reads besides log-probabilities and beta: options by name, or the "lengths".
READS: dict[str, tuple[str, ...]] = {
    "cdpo": ("label_smoothing",),
    "hinge": (),
    "ipo": ("lengths",),
    "sigmoid": (),
}


@dataclass(frozen=True)
class PreferenceOptions:
    """Which preference loss, and its constants.

    Args:
        loss_type: A name in ``LOSSES``: cdpo, hinge, ipo or sigmoid.
        beta: Strength of the pull to the reference; IPO's tau.
        label_smoothing: Probability that a preference is the wrong way round, for cdpo.
        where: Class or function the user called, for the message of an error.

    Raises:
        ValueError: If the loss is unknown, beta is not positive and finite, or the smoothing is
            outside [0, 0.5) or given for a loss without it.

    Example:
        >>> PreferenceOptions(loss_type="cdpo", label_smoothing=0.1).beta
        0.1
    """

    loss_type: str = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0
    where: InitVar[str] = "PreferenceOptions"

    def __post_init__(self, where: str) -> None:
        check_choice(where, "loss_type", self.loss_type, READS)
        if (finite_number(self.beta) or 0) <= 0:
            raise argument_error(where, "beta", self.beta, "must be positive and finite")
        if not 0 <= self.label_smoothing < 0.5:
            rule = "must be in [0, 0.5)"
            raise argument_error(where, "label_smoothing", self.label_smoothing, rule)
        for option in fields(self):
            value, readers = getattr(self, option.name), losses_that_read(option.name)
            if readers and self.loss_type not in readers and value != option.default:
                rule = (
                    f"must be {option.default!r} with loss_type={self.loss_type!r}, which has none"
                )
                way_out = f"Use {' or '.join(map(repr, readers))}"
                raise argument_error(where, option.name, value, rule, way_out)


def losses_that_read(name: str) -> list[str]:
    """Names of the losses that read an option, or the lengths; none for what every loss reads."""
    return [loss_type for loss_type, read in READS.items() if name in read]


def check_preference_arguments(
    where: str, loss_type: str, beta: float, label_smoothing: float
) -> None:
    """Refuse what ``preference_loss`` would refuse, for who wants to know it at construction.

    Args:
        where: Class or function the user called.
        loss_type: Key of ``LOSSES``.
        beta: Strength of the pull to the reference.
        label_smoothing: Probability that a preference is the wrong way round.

    Raises:
        ValueError: As ``PreferenceOptions``.
    """
    PreferenceOptions(loss_type, beta, label_smoothing, where)
