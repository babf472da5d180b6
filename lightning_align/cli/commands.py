"""The commands that are not Lightning's, by name: a line of help and the module that runs it.

Each module has ``parser()`` and ``main(arguments)``. Modules are named, not imported: a command
then starts without loading what only another one needs.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NoReturn

from jsonargparse import ArgumentParser
from typing_extensions import override

from lightning_align.cli.help_text import PlainHelp
from lightning_align.cli.mistakes import PROGRAM, report


class CommandParser(ArgumentParser):
    """The parser of one of these commands."""

    def __init__(
        self, prog: str | None = None, description: str | None = None, **options: Any
    ) -> None:
        # jsonargparse makes parsers of this class for the arguments of classes, with its options.
        # A prefix such as --temp would change its meaning with the next new option.
        options = {"formatter_class": PlainHelp, **options, "allow_abbrev": False}
        super().__init__(prog=prog, description=description, **options)

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what was wrong in one line, and exit with 2."""
        if not self.exit_on_error:
            super().error(message, ex)
        report(message, ex, self)
        self.exit(2)


@dataclass(frozen=True)
class Command:
    """A command and where it lives."""

    help: str
    module: str

    def load(self) -> ModuleType:
        """Import the module that runs it."""
        return importlib.import_module(self.module)


# Lightning's own, which the parser of `app` has.
RUNS = {
    "fit": "Train what a configuration describes.",
    "validate": "Evaluate a model on the validation data.",
    "test": "Evaluate a model on the test data.",
    "predict": "Run a model over the data for predictions.",
}

COMMANDS = {
    "recipes": Command("List, print and copy configurations.", "lightning_align.recipes"),
    "generate": Command("Write text with a trained model.", "lightning_align.cli.generate"),
    "export": Command("Write a checkpoint as a Hugging Face folder.", "lightning_align.cli.export"),
    "schedule": Command("Simulate and draw a pipeline.", "lightning_align.cli.schedule"),
    "plan": Command("What fits, how fast, and why.", "lightning_align.cli.plan"),
    "check": Command(
        "What fit would refuse, and need, before it trains.", "lightning_align.cli.check"
    ),
    "profile": Command("What bounds the steps of a run.", "lightning_align.cli.profile"),
    "spikes": Command("Read reports of loss spikes, or find spikes.", "lightning_align.cli.spikes"),
    "difficulty": Command(
        "Compute how difficult samples are, for a curriculum.", "lightning_align.cli.difficulty"
    ),
    "completion": Command("Print a completion script.", "lightning_align.cli.completion"),
    "demo": Command("The whole job on a novel, in a few minutes.", "lightning_align.demo.command"),
}

DESCRIPTION = """Train and align language models with PyTorch Lightning.

  lightning-align demo                     the whole job on a real novel, in a few minutes
  lightning-align recipes                  YAML files to begin with
  lightning-align fit -c pretrain.yaml     train what a YAML file describes
  lightning-align fit --print_config --model PretrainModule --data TextDataModule > my.yaml
"""

_AFTER = f"""
  -c FILE, --config FILE   a YAML file; of several, what comes later wins
  --print_config           print the configuration that results, and stop
  --debug                  with an error, its traceback

{PROGRAM} COMMAND --help        the options of a command
{PROGRAM} fit --model.help PretrainModule        the arguments of a class
"""


def overview() -> str:
    """What ``lightning-align --help`` prints, for which nothing has to be imported."""
    helps = {**RUNS, **{name: command.help for name, command in COMMANDS.items()}}
    lines = [f"    {name:12} {line}" for name, line in helps.items()]
    head = f"usage: {PROGRAM} COMMAND [options]\n\n{DESCRIPTION}"
    return "\n".join([head, "commands:", *lines, "", "options:"]) + _AFTER
