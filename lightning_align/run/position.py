"""Where a run stands: the number of training batches whose step is complete.

One integer, derived from the trainer's own progress so that it cannot drift from it. Lightning
saves that progress in every checkpoint, advances it before ``on_train_batch_end`` (where
checkpoints are written) and leaves it alone when a batch is interrupted, so "consumed" always means
"is part of the weights".
"""

from typing import Any

import lightning.pytorch as pl


def batches_consumed(trainer: pl.Trainer) -> int:
    """Training batches that this run has consumed so far, over all epochs (on each rank)."""
    total: Any = trainer.fit_loop.epoch_loop.batch_progress.total
    return int(total.processed)
