"""Leave a Hugging Face folder behind when training ends."""

import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch import nn
from typing_extensions import override

from lightning_align._declared import declared
from lightning_align._errors import argument_error
from lightning_align.layers.find import find_held_model
from lightning_align.models.adapters import has_adapters, refuse_lost
from lightning_align.models.build import refuse_adapter_of_another, save_pretrained
from lightning_align.run.protocols import tokenizer_of, whole_state_dict

ANOTHER = "Give another folder"


@declared
class SavePretrained(pl.Callback):
    """Write the trained model as a folder that ``AutoModelForCausalLM.from_pretrained`` loads.

    The datamodule's tokenizer goes with it. Written once, by rank 0, when ``fit`` has ended; from a
    pipeline, rank 0 collects the stages first and needs host memory for all of them; under
    ``ZeROInfinityStrategy`` its values are on disk, and read as the folder is written.

    Args:
        dirpath: Folder to write; created if it does not exist.

    Raises:
        ValueError: At ``setup``, if the LightningModule holds no Hugging Face model, no folder can
            be where ``dirpath`` says, or it holds an adapter and the model has none.

    Example:
        >>> callback = SavePretrained("outputs/model")
    """

    def __init__(self, dirpath: str) -> None:
        if "://" in str(dirpath):
            rule = "must be a local folder"
            way_out = "Write there, and copy the folder when the run has ended"
            raise argument_error("SavePretrained", "dirpath", dirpath, rule, way_out)
        self.dirpath = dirpath
        self._state: dict[str, Any] | None = None  # of the module, if its parts had to be collected

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        _, model = self._model(pl_module)
        if has_adapters(model) and not hasattr(model, "get_base_model"):  # PEFT's saves by itself
            refuse_lost(model, "SavePretrained", type(model).__name__)
        if trainer.is_global_zero:
            self._check_folder()
            refuse_adapter_of_another(model, self.dirpath, "SavePretrained", "dirpath")

    def _check_folder(self) -> None:
        """Refuse a place where nothing can be written when the run has ended.

        Raises:
            ValueError: If it, or what it would lie in, is a file or may not be written to.
        """
        place = Path(self.dirpath).expanduser().absolute()
        there = next(each for each in (place, *place.parents) if each.exists())
        if not there.is_dir():
            rule = "must be a folder, and it is a file" if there == place else f"{there} is a file"
            raise argument_error("SavePretrained", "dirpath", self.dirpath, rule, ANOTHER)
        if not os.access(there, os.W_OK | os.X_OK):
            rule = f"{there} may not be written to"
            raise argument_error("SavePretrained", "dirpath", self.dirpath, rule, ANOTHER)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Once fit has ended, the strategy has taken its parts down.
        self._state = whole_state_dict(trainer.strategy)

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._state is None:  # nothing was left to train
            self._state = whole_state_dict(trainer.strategy)
        state, self._state = self._state, None
        if not trainer.is_global_zero:
            return
        name, model = self._model(pl_module)
        if state is not None:
            state = {k.removeprefix(name): v for k, v in state.items() if k.startswith(name)}
        save_pretrained(model, self.dirpath, tokenizer_of(trainer), state)

    def _model(self, pl_module: pl.LightningModule) -> tuple[str, nn.Module]:
        """How names of its state begin in the module's, and the Hugging Face model."""
        way_out = "Use a Hugging Face model, or leave the callback out"
        name, model = find_held_model(
            pl_module, "save_pretrained", where="SavePretrained", way_out=way_out
        )
        return f"{name}.", model
