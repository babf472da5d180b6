"""A curriculum on an index that DeepSpeed has written, and in torchdata's loader."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_align import Curriculum
from tests.callbacks.curriculum.test_stream import Indices, data, linear, samples_of, texts, train
from tests.data.test_deepspeed_index import analyze
from tests.helpers.resumable import Fit, model_checkpoint, resumes
from tests.run.test_samplers import ROWS, Loads

pytestmark = pytest.mark.peer
__all__ = ["texts"]  # a fixture


def test_an_index_of_deepspeeds_analyzer_orders_samples(texts: Path, tmp_path: Path) -> None:
    """Batches are those of the difficulties themselves."""
    pytest.importorskip("deepspeed")
    values = [1 + (7 * sample) % 40 for sample in range(samples_of(data(texts)))]
    analyze(tmp_path, values)
    metric = {
        "index_to_sample_path": str(tmp_path / "m/m_index_to_sample"),
        "index_to_metric_path": str(tmp_path / "m/m_index_to_metric"),
        "difficulty_type": "percentile",
        **linear(6, 20, 100, 1),
    }
    learning = {"enabled": True, "curriculum_metrics": {"m": metric}}
    sampling = {"enabled": True, "curriculum_learning": learning}
    config = {"data_efficiency": {"enabled": True, "data_sampling": sampling}}
    by_values = {
        "difficulties": {"m": values},
        "scheduler": {"m": linear(6, 20, 100, 1)},
        "difficulty_type": "percentile",
    }

    def batches(order: dict[str, Any]) -> list[list[int]]:
        noted = Indices()
        train(Curriculum(order=order, filename=None, preflight=False), data(texts), noted)
        return noted.batches

    found = batches(config)
    assert found == batches(by_values)
    assert max(values[sample] for sample in found[0]) <= np.percentile(values, 40)


class Stateful(Loads):
    """Its batches come from torchdata's loader, which keeps its sampler's state."""

    def train_dataloader(self) -> Any:
        from torchdata.stateful_dataloader import StatefulDataLoader

        workers = {"num_workers": 2, "multiprocessing_context": "fork"}
        options = workers if self.loader == "workers" else {}
        return StatefulDataLoader(ROWS, sampler=self.easy_first(), batch_size=None, **options)


@pytest.mark.parametrize("name", ["plain", "workers"])
def test_in_torchdatas_loader_a_curriculum_is_resumed(name: str, tmp_path: Path) -> None:
    """Amid the levels, behind the last and in a later epoch."""
    resumes(Fit(tmp_path, lambda: Stateful(name), model_checkpoint), 3, 8)
