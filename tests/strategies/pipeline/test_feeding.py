"""Our datamodules under a pipeline: its ranks are one replica, and all get the same rows."""

from pathlib import Path
from typing import Any

import pytest

from lightning_align import PretrainModule, TextDataModule
from tests.helpers.pipelines import ADAMW, Run
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny_models import TINY_MODELS

pytestmark = pytest.mark.slow  # `make test-laws` runs them


def test_every_rank_has_the_rows_of_one_process(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(f"It is a truth number {number}." for number in range(400)))
    run = Run("llama", {"schedule": "1F1B", "num_microbatches": 4}, trainer={"max_steps": 4})
    options: Any = {"vocab_size": 300, "block_size": 16, "val_fraction": 0, "cache_dir": tmp_path}

    def train(rank: int | None) -> tuple[list[float], int]:
        module = PretrainModule(
            TINY_MODELS["llama"](vocab_size=300, num_hidden_layers=4), optimizer=ADAMW
        )
        with run.setting(rank) as (trainer, seen):
            trainer.fit(module, datamodule=TextDataModule(str(corpus), **options))
        return seen.losses, int(module.tokens_seen)

    theirs, tokens = train(None)
    ours = run_ranks(train)
    assert len(theirs) == 4
    # nats, and summation order
    assert ours[0][0] == pytest.approx(theirs, rel=2e-5)
    assert ours[0] == ours[1]
    assert ours[0][1] == tokens
