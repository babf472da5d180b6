"""The ``lightning-align`` command: LightningCLI over our classes and everybody else's."""

from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies import Strategy, StrategyRegistry
from typing_extensions import override

import lightning_align
from lightning_align.cli.commands import COMMANDS
from lightning_align.cli.layering import AlignParser, LayeredConfigFile
from lightning_align.cli.mistakes import PROGRAM, did_you_mean, refusals_told
from lightning_align.models.weights import parameters_on_meta

# Imported so that their short names work in YAML: `class_path: PretrainModule`.
for name in lightning_align.__all__:
    getattr(lightning_align, name)

DESCRIPTION = """Train and align language models with PyTorch Lightning.

  lightning-align demo                     the whole job on a real novel, in a few minutes
  lightning-align recipes                  YAML files to begin with
  lightning-align fit -c pretrain.yaml     train what a YAML file describes
  lightning-align fit --print_config --model PretrainModule --data TextDataModule > my.yaml
"""


class AlignCLI(LightningCLI):
    """LightningCLI with a fixed seed by default and checkpoints loaded as plain data only.

    The optimizer belongs to the module (``model.init_args.optimizer``), which hands it named
    parameter groups. What a later layer of configuration inherits: see ``configuration``.
    """

    def __init__(self, args: Sequence[str] | None = None) -> None:
        super().__init__(
            args=list(args) if args is not None else None,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            parser_class=AlignParser,
            save_config_kwargs={"overwrite": True},
            # argparse would fold the lines of the description into one paragraph.
            parser_kwargs={
                "prog": PROGRAM,
                "description": DESCRIPTION,
                "formatter_class": RawDescriptionHelpFormatter,
            },
        )

    @override
    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        kwargs.setdefault("dump_header", [f"lightning-align=={lightning_align.__version__}"])
        parser = AlignParser(**kwargs)
        help_config = "YAML file, or several: what comes later wins."
        parser.add_argument("-c", "--config", action=LayeredConfigFile, help=help_config)
        return parser

    @override
    def setup_parser(self, *args: Any) -> None:
        super().setup_parser(*args)
        commands: Any = self.parser.commands  # type: ignore[attr-defined]
        for name, command in COMMANDS.items():
            commands.add_subcommand(name, command.load().parser(), help=command.help)

    def _parse_ckpt_path(self) -> None:
        """Leave the configuration as it was written.

        Lightning would put the hyperparameters of the checkpoint over it: a learning rate that
        the user changed for a resumed run, and even another class, would be lost without a word.
        """

    @override
    def before_instantiate_classes(self) -> None:
        options = self.config[self.subcommand]
        if options.get("weights_only") is None:
            options["weights_only"] = True  # a checkpoint must not run code
        strategy = options.trainer.strategy
        registered = ["auto", *StrategyRegistry.available_strategies()]
        if isinstance(strategy, str) and strategy not in registered:
            self._strategy_by_class_name(options, strategy)

    @override
    def instantiate_classes(self) -> None:
        """Build everything; the model comes without its weights if the strategy asks for that."""
        strategy = self.config[self.subcommand].trainer.strategy
        empty = isinstance(strategy, Namespace) and strategy.get("init_args.empty_init")
        with refusals_told(), parameters_on_meta() if empty else nullcontext():
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


class _BuiltError(Exception):
    """Carries the parser out of a ``LightningCLI``, which parses as soon as it is made."""


class _ParserOnly(AlignCLI):
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
