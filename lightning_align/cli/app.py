"""The ``lightning-align`` command: LightningCLI over our classes and everybody else's."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.strategies import Strategy, StrategyRegistry
from typing_extensions import override

import lightning_align
from lightning_align._errors import argument_error
from lightning_align.cli.commands import COMMANDS, DESCRIPTION, RUNS
from lightning_align.cli.failures import (
    DEBUG,
    debug_if_asked,
    refusals_raised,
    refusals_told,
    show_tracebacks,
)
from lightning_align.cli.help_text import PlainHelp
from lightning_align.cli.layering import AlignParser, LayeredConfigFile
from lightning_align.cli.mistakes import PROGRAM, did_you_mean
from lightning_align.models.weights import parameters_on_meta

# Imported so that their short names work in YAML: `class_path: PretrainModule`.
for name in lightning_align.__all__:
    if name != "AlignCLI":
        getattr(lightning_align, name)

_NO_FILES = ("best", "last", "hpc", "registry")  # words that Lightning takes as ckpt_path


class AlignCLI(LightningCLI):
    """LightningCLI with layers of configuration, mistakes told in a line, and plain checkpoints.

    A script of your own stands on it as on LightningCLI, whose arguments and methods to override it
    has. It differs in what is the default: the seed is 0, no optimizer is added to the options (our
    modules have theirs, ``model.optimizer``), a run's ``config.yaml`` replaces an older one, and
    checkpoints are loaded as plain data only.

    Args:
        model_class: LightningModule whose arguments become options, or a function that returns
            one; left out, any class is named by ``--model``.
        datamodule_class: LightningDataModule likewise, by ``--data``.
        save_config_callback: Callback that saves the configuration of a run; None saves none.
        save_config_kwargs: Its arguments.
        trainer_class: Trainer, or a function that returns one.
        trainer_defaults: Defaults of the Trainer's arguments; ``callbacks`` are always there.
        seed_everything_default: Seed; True draws one, False seeds nothing.
        parser_kwargs: Arguments of the parser, or of each command's by its name.
        parser_class: An ``AlignParser``.
        subclass_mode_model: Whether any subclass of ``model_class`` may be named.
        subclass_mode_data: Whether any subclass of ``datamodule_class`` may be named.
        args: Words of a command line, or a configuration; left out, those of the program.
        run: Whether there are commands, such as fit, that run; else everything is built only.
        auto_configure_optimizers: Whether ``--optimizer`` and ``--lr_scheduler`` are options, for a
            module that configures none.
        load_from_checkpoint_support: Whether hyperparameters are saved as they were configured.

    Raises:
        ValueError: If what should be a class is none.
    """

    _tells_mistakes = False  # whatever the arguments are; else where they are those of the program

    def __init__(
        self,
        model_class: type[pl.LightningModule] | Callable[..., pl.LightningModule] | None = None,
        datamodule_class: (
            type[pl.LightningDataModule] | Callable[..., pl.LightningDataModule] | None
        ) = None,
        save_config_callback: type[SaveConfigCallback] | None = SaveConfigCallback,
        save_config_kwargs: dict[str, Any] | None = None,
        trainer_class: type[pl.Trainer] | Callable[..., pl.Trainer] = pl.Trainer,
        trainer_defaults: dict[str, Any] | None = None,
        seed_everything_default: bool | int = 0,
        parser_kwargs: dict[str, Any] | None = None,
        parser_class: type[LightningArgumentParser] = AlignParser,
        subclass_mode_model: bool = False,
        subclass_mode_data: bool = False,
        args: Any = None,
        run: bool = True,
        auto_configure_optimizers: bool = False,
        load_from_checkpoint_support: bool = True,
    ) -> None:
        _check_classes(
            model_class=model_class, datamodule_class=datamodule_class, trainer_class=trainer_class
        )
        if not (isinstance(parser_class, type) and issubclass(parser_class, AlignParser)):
            rule = "must be AlignParser or a subclass of it"
            raise argument_error("AlignCLI", "parser_class", parser_class, rule)
        kwargs = {"formatter_class": PlainHelp, **(parser_kwargs or {})}
        if run:  # Lightning's own lines are cut off in the middle of a sentence
            for name in RUNS.keys() & self.subcommands().keys():
                kwargs[name] = {"description": RUNS[name], **kwargs.get(name, {})}
        # Who calls it from Python with arguments wants the exception; a command line, a line.
        self._tells_mistakes = self._tells_mistakes or args is None
        program = kwargs.get("prog") or Path(sys.argv[0]).name
        told = refusals_told(program) if args is None and run else nullcontext()
        with debug_if_asked([]), told:  # `parse_arguments` reads the words
            super().__init__(
                model_class,
                datamodule_class,
                save_config_callback,
                {"overwrite": True, **(save_config_kwargs or {})},
                trainer_class,
                trainer_defaults,
                seed_everything_default,
                kwargs,
                parser_class,
                subclass_mode_model,
                subclass_mode_data,
                args,
                run,
                auto_configure_optimizers,
                load_from_checkpoint_support,
            )

    @override
    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        kwargs.setdefault("dump_header", [f"lightning-align=={lightning_align.__version__}"])
        kwargs.setdefault("formatter_class", PlainHelp)
        parser = self.parser_class(**kwargs)
        help_config = "YAML file, or several: what comes later wins."
        parser.add_argument("-c", "--config", action=LayeredConfigFile, help=help_config)
        return parser

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, less ``--debug``, which is no setting of the run unless the user has made one."""
        words = sys.argv[1:] if args is None else args
        asked = isinstance(words, (list, tuple)) and DEBUG in words
        if asked and not self._has_option(parser, DEBUG):
            show_tracebacks()
            self.config = parser.parse_args([word for word in words if word != DEBUG])
        else:
            super().parse_arguments(parser, args)

    def _has_option(self, parser: LightningArgumentParser, option: str) -> bool:
        of_commands = vars(self).get("_subcommand_parsers", {})  # with run=False there are none
        return any(
            option in each._option_string_actions for each in (parser, *of_commands.values())
        )

    def _parse_ckpt_path(self) -> None:
        """Leave the configuration as it was written.

        Lightning would put the hyperparameters of the checkpoint over it: a learning rate that
        the user changed for a resumed run, and even another class, would be lost without a word.
        """

    @property
    def _options(self) -> Namespace:
        """The configuration of the command that runs, or all of it where none does."""
        options: Namespace = self.config[self.subcommand] if self.subcommand else self.config
        return options

    @override
    def before_instantiate_classes(self) -> None:
        options = self._options
        if "weights_only" in options and options["weights_only"] is None:
            options["weights_only"] = True  # a checkpoint must not run code
        path = options.get("ckpt_path")
        is_file = path and "://" not in path and path.partition(":")[0] not in _NO_FILES
        if is_file and not os.path.exists(path):
            self.parser.error(f"ckpt_path: there is no checkpoint {path}.")
        strategy = options.get("trainer.strategy")
        registered = ["auto", *StrategyRegistry.available_strategies()]
        if isinstance(strategy, str) and strategy not in registered:
            self._strategy_by_class_name(options, strategy)

    @override
    def instantiate_classes(self) -> None:
        """Build everything; the model comes without its weights if the strategy asks for that."""
        strategy = self._options.get("trainer.strategy")
        empty = isinstance(strategy, Namespace) and strategy.get("init_args.empty_init")
        program = self.parser.prog
        told = refusals_told(program, everything=True)
        with (
            told if self._tells_mistakes else refusals_raised(),
            parameters_on_meta() if empty else nullcontext(),
        ):
            super().instantiate_classes()

    def _strategy_by_class_name(self, options: Namespace, name: str) -> None:
        """Turn the name of a class into a class: jsonargparse takes it for a registered string."""
        known = subclasses(Strategy)
        if name.rpartition(".")[2] not in known:
            names = ["auto", *StrategyRegistry.available_strategies(), *known]
            hint = did_you_mean(name, names)
            self.parser.error(f"trainer.strategy: no strategy of the name {name}.{hint}")
        spec = {"class_path": known[name.rpartition(".")[2]]}
        options["trainer.strategy"] = Namespace(spec)  # type: ignore[no-untyped-call]


def subclasses(base: type) -> dict[str, str]:
    """Short name -> import path of every imported subclass of ``base``."""
    found: dict[str, str] = {}
    waiting: list[type] = base.__subclasses__()
    while waiting:
        cls = waiting.pop()
        waiting += cls.__subclasses__()
        found[cls.__name__] = f"{cls.__module__}.{cls.__qualname__}"
    return found


def _check_classes(**given: object) -> None:
    for argument, value in given.items():
        if value is not None and not callable(value):
            rule = "must be a class, or a function that returns its instance"
            way_out = "Give the words of a command line as args"
            raise argument_error("AlignCLI", argument, value, rule, way_out)


class Program(AlignCLI):
    """The ``lightning-align`` command itself, whose help names its other commands as well.

    Args:
        args: Words of its command line; left out, those of the program.
    """

    _tells_mistakes = True

    def __init__(self, args: Sequence[str] | None = None) -> None:
        kwargs = {"prog": PROGRAM, "description": DESCRIPTION}
        super().__init__(args=None if args is None else list(args), parser_kwargs=kwargs)

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse; Lightning would warn of words that are not the program's own."""
        if args is None:
            super().parse_arguments(parser, None)
        else:
            self.config = parser.parse_args([word for word in args if word != DEBUG])

    @override
    def setup_parser(self, *args: Any) -> None:
        super().setup_parser(*args)
        commands: Any = self.parser.commands  # type: ignore[attr-defined]
        for name, command in COMMANDS.items():
            # Their options are not needed here, and take seconds to import.
            commands.add_subcommand(name, AlignParser(), help=command.help)


def run_program(args: Sequence[str] | None = None) -> AlignCLI:
    """Run ``lightning-align`` with a command of Lightning's.

    Args:
        args: Words of its command line; left out, those of the program.
    """
    return Program(args)


class _BuiltError(Exception):
    """Carries the parser out of a ``LightningCLI``, which parses as soon as it is made."""


class _ParserOnly(Program):
    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        raise _BuiltError(parser)


def build_parser() -> AlignParser:
    """The parser of the whole command line, without running anything."""
    try:
        _ParserOnly([])
    except _BuiltError as built:
        parser = built.args[0]
    assert isinstance(parser, AlignParser)
    return parser
