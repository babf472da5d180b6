"""Completion of the command line by TAB, as a script for the shell.

jsonargparse can write one too, but follows every class into every argument of every subclass that
is imported, and torch and transformers have thousands: it did not end within eight minutes. This
one goes one class deep, into the classes of this package.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import lightning_align
from lightning_align._errors import argument_error
from lightning_align.cli.commands import COMMANDS, RUNS, CommandParser
from lightning_align.cli.failures import DEBUG
from lightning_align.cli.mistakes import PROGRAM, argument_names, option_strings

FILES = ("--config", "--ckpt_path", "--ckpt", "--output", "--model.model", "--data.paths")


def script(shell: str) -> str:
    """The completion script for ``shell``.

    Raises:
        ValueError: If shtab is not installed, or knows no such shell.
    """
    try:
        import shtab
    except ImportError as error:
        rule, way_out = "needs shtab", "Run: pip install 'lightning-align[completion]'"
        raise argument_error("completion", "shell", shell, rule, way_out) from error
    if shell not in shtab.SUPPORTED_SHELLS:
        rule = f"must be one of {', '.join(shtab.SUPPORTED_SHELLS)}"
        raise argument_error("completion", "shell", shell, rule)
    from lightning_align.cli.app import build_parser

    plain = argparse.ArgumentParser(prog=PROGRAM)
    commands = plain.add_subparsers()
    values, inside = _values(), _options_inside()
    runs = {name: build_parser().commands.choices[name] for name in RUNS}
    others = {name: command.load().parser() for name, command in COMMANDS.items()}
    for name, command in {**runs, **others}.items():
        added = commands.add_parser(name, help=(command.description or "").partition("\n")[0])
        options = option_strings([command])
        more = inside if "--trainer" in options else []
        for option in sorted({*options, *more, DEBUG} - {"--help"}):
            argument: Any = added.add_argument(option, choices=values.get(option))
            if option in FILES:
                argument.complete = shtab.FILE
        if "--config" in options:
            added.add_argument("-c").complete = shtab.FILE  # type: ignore[attr-defined]
    return str(shtab.complete(plain, shell))


def _values() -> dict[str, list[str]]:
    """Option -> values to choose from: short names of classes, mostly."""
    from lightning.pytorch import Callback, LightningDataModule, LightningModule
    from lightning.pytorch.loggers import Logger
    from lightning.pytorch.strategies import Strategy, StrategyRegistry
    from torch.optim import Optimizer

    from lightning_align.cli.app import subclasses

    def classes(base: type) -> list[str]:
        return sorted(name for name in subclasses(base) if not name.startswith("_"))

    callbacks = classes(Callback)
    strategies = ["auto", *StrategyRegistry.available_strategies(), *classes(Strategy)]
    return {
        "--model": _ours(LightningModule),
        "--data": _ours(LightningDataModule),
        "--model.optimizer": classes(Optimizer),
        "--trainer.strategy": strategies,
        "--trainer.callbacks": callbacks,
        "--trainer.callbacks+": callbacks,
        "--trainer.logger": classes(Logger),
        "--trainer.accelerator": ["auto", "cpu", "gpu", "cuda", "mps", "tpu"],
        "--trainer.precision": ["32-true", "16-mixed", "bf16-mixed", "bf16-true", "64-true"],
    }


def _ours(base: type) -> list[str]:
    public = {name: getattr(lightning_align, name) for name in lightning_align.__all__}
    return [n for n, value in public.items() if isinstance(value, type) and issubclass(value, base)]


def _options_inside() -> list[str]:
    """Options of this package's modules and datamodules, and of the usual optimizer."""
    from lightning.pytorch import LightningDataModule, LightningModule

    found = {"--trainer.callbacks+"}
    for option, base in (("--model", LightningModule), ("--data", LightningDataModule)):
        for name in _ours(base):
            found |= {f"{option}.{a}" for a in argument_names(f"lightning_align.{name}")}
    found |= {f"--model.optimizer.{a}" for a in argument_names("torch.optim.AdamW")}
    return sorted(found - {"--model.optimizer.params"})


def parser() -> CommandParser:
    """Options of ``lightning-align completion``."""
    about = "Print a script that completes commands, options and class names by TAB."
    parser = CommandParser(f"{PROGRAM} completion", about)
    help_shell = "bash, zsh, tcsh, or another shell that shtab knows."
    parser.add_argument("shell", type=str, help=help_shell)
    return parser


def main(arguments: Sequence[str]) -> None:
    """Run ``lightning-align completion``."""
    print(script(parser().parse_args(list(arguments)).shell))  # noqa: T201
