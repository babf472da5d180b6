"""Which schedule a batch runs under, and that none of them changes what it comes to."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.pipelines import Run, one_process, pipeline
from tests.helpers.ranks import run_ranks

ONE_F_ONE_B = {"schedule": "1F1B", "num_microbatches": 4}
RUN = Run("chain", ONE_F_ONE_B, steps=4, data={"masked": False})


def test_a_batch_too_small_for_the_schedule_falls_back_and_says_so() -> None:
    def train(rank: int) -> Any:
        run = replace(RUN, steps=5, data={"ragged": True, "masked": False})
        with run.setting(rank) as (trainer, _):
            module, loader = run.module(), run.loader()
            loader.dataset.batches[4] = {  # type: ignore[attr-defined]
                name: value[:1] for name, value in loader.dataset[4].items()
            }
            warning = r"1 micro-batch\(es\) runs under GPipe, not 1F1B"
            told = pytest.warns(UserWarning, match=warning) if rank == 0 else nullcontext()
            with told:
                trainer.fit(module, loader)
            return trainer.strategy.schedule_in_use

    assert run_ranks(train)[0] == "GPipe"


def test_schedule_csv_runs_in_place_of_the_schedule(tmp_path: Path) -> None:
    path = tmp_path / "schedule.csv"
    rows = ["0F0,0F1,0B0,0F2,0B1,0F3,0B2,0B3", "1F0,1B0,1F1,1B1,1F2,1B2,1F3,1B3"]
    path.write_text("\n".join(rows))
    run = replace(RUN, strategy={"num_microbatches": 4, "schedule_csv": str(path)})
    ours = pipeline(run)[0]
    assert ours["schedule"] == "csv"
    assert ours["losses"] == pytest.approx(one_process(run)["losses"], rel=2e-5)
