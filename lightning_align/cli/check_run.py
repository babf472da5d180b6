"""The run behind ``lightning-align check``: a ``fit`` that ends where training would begin.

Everything up to there is the real thing: processes, data, strategy, callbacks, optimizer. Where the
devices of the run are not here, one process on the CPU takes their place; where memory has no room
for the weights, they have shapes only. What this leaves out is said.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint
from typing_extensions import override

from lightning_align.cli import check_report
from lightning_align.cli.check import Check
from lightning_align.cli.check_split import Devices, devices_of
from lightning_align.cli.profile_meta import full_batch
from lightning_align.cli.traceless import Traceless, folders_as_they_were
from lightning_align.models.weights import parameters_on_meta

_SHARE = 0.5  # of the memory that is free, for weights


class CheckCLI(Traceless):
    """The command whose ``fit`` sets everything up and reports.

    Args:
        args: Those of ``fit``.
        check: What is asked for.
        folder: For whatever the set-up writes; its end is up to the caller.
    """

    def __init__(self, args: Sequence[str], check: Check, folder: str) -> None:
        self.check = check
        self.devices = Devices()
        self.has_values = True
        self.unchecked: list[str] = []
        super().__init__(args, folder)

    @override
    def before_instantiate_classes(self) -> None:
        super().before_instantiate_classes()
        options = self._options
        if options.get("ckpt_path"):
            self.unchecked.append(f"whether {options['ckpt_path']} continues this run")
            options["ckpt_path"] = None
        self.devices = devices_of(options.trainer)
        self.unchecked += self.devices.unchecked

    @override
    def instantiate_classes(self) -> None:
        """Build everything, at first without weights, to see whether there is room for them."""
        if self.check.weights != "always":
            try:
                with parameters_on_meta():
                    super().instantiate_classes()
            except (Exception, SystemExit):  # a constructor that reads values, or a mistake
                self.model = None
            self.has_values = self.model is None or self._has_room()
        if self.has_values and self.check.weights != "never":
            super().instantiate_classes()
        elif self.model is None:
            with parameters_on_meta():
                super().instantiate_classes()  # raises what it raised
        self.has_values = self.has_values and self.check.weights != "never"

    def _has_room(self) -> bool:
        copies = 2 if hasattr(self.model, "ref_model") or hasattr(self.model, "_reference") else 1
        needed: float = sum(p.numel() * p.element_size() for p in self.model.parameters())
        processes = 1 if self.devices.is_stand_in else self.devices.world
        return bool(copies * processes * needed < _SHARE * _free_memory())

    @override
    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        off = self._options.trainer.enable_checkpointing is False
        set_up = SetUp(self) if off else SetUpBehindCheckpoints(self)
        quiet = self.quiet([*self.given_callbacks(), set_up])
        if self.devices.is_stand_in:
            quiet |= {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "auto"}
            if str(self._options.trainer.precision).startswith(("16", "transformer-engine")):
                quiet["precision"] = "32-true"
        return super().instantiate_trainer(**{**kwargs, **quiet})

    def fit(self, model: pl.LightningModule, datamodule: Any = None, **options: Any) -> None:
        """What runs in the place of ``Trainer.fit``."""
        if not self.has_values:
            self.unchecked.append(
                "what set-up refuses: the weights have shapes only, and data were not read"
            )
            check_report.tell(self, full_batch(model, datamodule))
            return
        if _is_asked_once(model):
            vars(model)["on_fit_start"] = lambda: None  # which asks the reference about all data
            self.unchecked.append("what the reference says of the data, which training computes")
        places = [getattr(each, "dirpath", None) for each in self.given_callbacks()]
        with folders_as_they_were([each for each in places if each]):
            self.trainer.fit(model, datamodule=datamodule, **options)


class SetUp(pl.Callback):
    """Ends a run where its training would begin.

    Args:
        cli: Whose run it is.
    """

    def __init__(self, cli: CheckCLI) -> None:
        self.cli = cli
        self._others: list[pl.Callback] = []

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        loader: Any = trainer.train_dataloader
        batch = next(iter(loader), None)
        check_report.tell(self.cli, batch)
        trainer.should_stop = True
        # Nothing has been trained that the others could save or draw.
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        self._others = [each for each in callbacks if each is not self]
        callbacks[:] = [self]

    @override
    def teardown(self, trainer: pl.Trainer, *args: Any, **options: Any) -> None:
        """Let the others end what they began; they are behind this one in the list."""
        trainer.callbacks[:] = [self, *self._others]  # type: ignore[attr-defined]


class SetUpBehindCheckpoints(SetUp, Checkpoint):
    """Lightning puts checkpoints last, and refuses them where checkpointing is off."""


def _is_asked_once(model: Any) -> bool:
    return getattr(getattr(model, "_reference", None), "cached", None) is not None


def _free_memory() -> float:
    pages: float = os.sysconf("SC_AVPHYS_PAGES")
    try:
        with open("/proc/meminfo") as file:
            found = [line.split()[1] for line in file if line.startswith("MemAvailable:")]
    except OSError:
        found = []
    return 1024.0 * float(found[0]) if found else pages * os.sysconf("SC_PAGE_SIZE")
