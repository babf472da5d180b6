"""``lightning-align demo``: its options, for which nothing heavy is imported."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_align.cli.commands import CommandParser

if TYPE_CHECKING:
    from lightning_align.demo.run import Fit, Report


def parser() -> CommandParser:
    """Options of ``lightning-align demo``."""
    about = "Pretrain a small Llama on Pride and Prejudice and align it with DPO."
    parser = CommandParser("lightning-align demo", about)
    help_fast = "Train for seconds instead of minutes; the numbers then mean little."
    parser.add_argument("--fast", action="store_true", help=help_fast)
    parser.add_argument("--output", default="outputs", help="Folder for all that is written.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of weights, order and samples.")
    return parser


def main(arguments: Sequence[str], fit: Fit | None = None) -> Report:
    """Parse ``arguments`` and run.

    Args:
        arguments: What follows ``demo`` on the command line.
        fit: The command line itself, which runs the two training stages.

    Returns:
        What is printed. Before there is no accuracy: policy and reference are the same.
    """
    options = parser().parse_args(list(arguments))
    from lightning_align.cli.app import run_program
    from lightning_align.demo.run import run_demo

    output = Path(options.output)
    return run_demo(fit or run_program, fast=options.fast, output=output, seed=options.seed)
