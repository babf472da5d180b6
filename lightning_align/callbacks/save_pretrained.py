"""Leave a Hugging Face folder behind when training ends."""

import lightning.pytorch as pl
from torch import nn
from typing_extensions import override

from lightning_align._errors import argument_error
from lightning_align.pretrained import save_pretrained


class SavePretrained(pl.Callback):
    """Write the trained model as a folder that ``AutoModelForCausalLM.from_pretrained`` loads.

    The datamodule's tokenizer goes with it. Written once, by rank 0, when ``fit`` has ended.

    Args:
        dirpath: Folder to write; created if it does not exist.

    Raises:
        ValueError: At ``setup``, if the LightningModule holds no Hugging Face model.

    Example:
        >>> callback = SavePretrained("outputs/model")
    """

    def __init__(self, dirpath: str) -> None:
        self.dirpath = dirpath

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._model(pl_module)

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            tokenizer = getattr(getattr(trainer, "datamodule", None), "tokenizer", None)
            save_pretrained(self._model(pl_module), self.dirpath, tokenizer)

    def _model(self, pl_module: pl.LightningModule) -> nn.Module:
        for module in pl_module.modules():
            if callable(getattr(module, "save_pretrained", None)) and module is not pl_module:
                return module
        rule = f"{type(pl_module).__name__} holds no module with save_pretrained"
        way_out = "Use a Hugging Face model, or leave the callback out"
        raise argument_error("SavePretrained", "dirpath", self.dirpath, rule, way_out)
