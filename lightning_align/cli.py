"""The ``lightning-align`` command: LightningCLI over our classes and everybody else's."""

import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence

from lightning.pytorch.cli import LightningCLI
from typing_extensions import override

# Imported so that their short names work in YAML: `class_path: PretrainModule`.
from lightning_align.callbacks.generate_samples import GenerateSamples
from lightning_align.callbacks.metric_plot import MetricPlot
from lightning_align.callbacks.save_pretrained import SavePretrained
from lightning_align.callbacks.token_schedule import TokenSchedule
from lightning_align.demo.run import main as demo
from lightning_align.modules.dpo import DPOModule
from lightning_align.modules.preference_data import PreferenceDataModule
from lightning_align.modules.pretrain import PretrainModule
from lightning_align.modules.text_data import TextDataModule
from lightning_align.run.exact_resume import ExactResume

__all__ = [
    "AlignCLI",
    "DPOModule",
    "ExactResume",
    "GenerateSamples",
    "MetricPlot",
    "PreferenceDataModule",
    "PretrainModule",
    "SavePretrained",
    "TextDataModule",
    "TokenSchedule",
    "main",
]

DESCRIPTION = """Train and align language models with PyTorch Lightning.

  lightning-align demo                     the whole job on a real novel, in a few minutes
  lightning-align fit -c pretrain.yaml     train what a YAML file describes
  lightning-align fit --print_config --model PretrainModule --data TextDataModule > my.yaml
"""


class AlignCLI(LightningCLI):
    """LightningCLI with a fixed seed by default and checkpoints loaded as plain data only.

    The optimizer belongs to the module (``model.init_args.optimizer``), which hands it named
    parameter groups.
    """

    def __init__(self, args: Sequence[str] | None = None) -> None:
        super().__init__(
            args=list(args) if args is not None else None,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            save_config_kwargs={"overwrite": True},
            # argparse would fold the lines of the description into one paragraph.
            parser_kwargs={
                "description": DESCRIPTION,
                "formatter_class": RawDescriptionHelpFormatter,
            },
        )

    @override
    def before_instantiate_classes(self) -> None:
        options = self.config[self.subcommand]
        if options.get("weights_only") is None:
            options["weights_only"] = True  # a checkpoint must not run code


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; ``args`` defaults to ``sys.argv[1:]``."""
    arguments = list(sys.argv[1:] if args is None else args)
    if arguments[:1] == ["demo"]:
        demo(arguments[1:], fit=AlignCLI)
    else:
        AlignCLI(args)
