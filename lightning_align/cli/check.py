"""``lightning-align check``: what ``fit`` would refuse and need, without any training."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_align._errors import check_choice
from lightning_align.cli.commands import CommandParser
from lightning_align.cli.failures import refusals_told
from lightning_align.cli.mistakes import PROGRAM
from lightning_align.cli.profile import divided, parser_of

REFUSED = 2


@dataclass(frozen=True)
class Check:
    """What is asked for.

    Args:
        hardware: Devices of the real run by a maker's name, such as h100-sxm, whose memory is
            compared; by default what is at hand.
        weights: Whether values of the weights are read or drawn: auto where memory here has room
            for them, always, or never.

    Raises:
        ValueError: If there is no such hardware, or weights is none of the three.
    """

    hardware: str | None = None
    weights: str = "auto"

    def __post_init__(self) -> None:
        check_choice("check", "weights", self.weights, ("auto", "always", "never"))
        if self.hardware is not None:
            from lightning_align.planner import HardwareSpec  # seconds, for torch

            HardwareSpec.from_name(self.hardware)


def parser() -> CommandParser:
    """Options of ``lightning-align check``, without those of ``fit``."""
    about = (
        "Check a configuration before it trains: what its classes and its set-up refuse, the shapes"
        " of a batch, where a pipeline is cut, and the memory that it needs. Takes all options of"
        " fit besides, such as -c run.yaml. Nothing is trained, and no checkpoint or log is left."
        " Ends with 0, or with 2 if something is refused."
    )
    return parser_of("check", about, Check)


def main(arguments: Sequence[str]) -> None:
    """Run ``lightning-align check``; a refusal ends it with 2."""
    own, others = divided(arguments, Check)
    if {"-h", "--help"} & set(others):
        own, others = ["--help"], []
    options = parser().parse_args(own).as_dict()
    try:
        with refusals_told(PROGRAM):
            check = Check(**options)
        from lightning_align.cli.check_run import CheckCLI  # seconds, for Lightning
        from lightning_align.cli.traceless import scratch_folder

        # What a Trainer says of a run is not about this one.
        logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
        logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
        with refusals_told(PROGRAM, everything=True), scratch_folder("check") as folder:
            CheckCLI(["fit", *others], check, folder)
    except SystemExit as end:
        if isinstance(end.code, str):
            sys.stderr.write(f"{end.code}\n")
            sys.exit(REFUSED)
        raise
