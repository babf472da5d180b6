"""The quick part; tests/strategies/test_pipeline_checkpoint_folder.py has the rest."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_align import _compat_dcp
from tests.helpers.pipelines import PositionedBatches, Run
from tests.helpers.ranks import run_ranks
from tests.strategies.test_pipeline_checkpoints import SaveAt

STRATEGY = {"schedule": "1F1B", "num_microbatches": 4, "save_distributed_checkpoint": True}
RUN = Run("chain", STRATEGY, steps=4)


def test_each_rank_reads_its_own_stages_and_goes_on_exactly(tmp_path: Path) -> None:
    """The learning rate is the checkpoint's, and not that of the module that goes on."""
    folder = tmp_path / "step2"

    def train(rank: int) -> list[float]:
        with RUN.setting(rank) as (trainer, seen):
            trainer.callbacks.append(SaveAt(2, folder))
            trainer.fit(RUN.module(), datamodule=PositionedBatches(4))
        losses: list[float] = seen.losses
        return losses

    def resume(rank: int) -> tuple[list[float], set[str], set[str]]:
        run = Run(**{**vars(RUN), "optimizer": partial(torch.optim.AdamW, lr=1.0)})
        keys: set[str] = set()
        read = _compat_dcp.read

        def note(path: Path, index: Any, wanted: Any) -> dict[str, Any]:
            keys.update(_compat_dcp.names(index)[key][1] for key in wanted if "model." in key)
            return read(path, index, wanted)

        with run.setting(rank) as (trainer, seen), pytest.MonkeyPatch.context() as patch:
            patch.setattr(_compat_dcp, "read", note)
            module = run.module()
            trainer.fit(module, datamodule=PositionedBatches(4), ckpt_path=folder)
        here = {name for name, value in module.named_parameters() if not value.is_meta}
        return seen.losses, keys, here

    whole = run_ranks(train)[0]
    for losses, keys, here in run_ranks(resume):
        assert losses == whole[2:]
        assert keys == here
