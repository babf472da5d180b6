"""Attributes of a module: what a step changes is seen, and taken back."""

from collections import deque
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from lightning_align.strategies.pipeline import step_attributes
from lightning_align.strategies.pipeline.step_attributes import StepAttributes


class Meter:
    def __init__(self) -> None:
        self.total = 0.0


class Keeper(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.layer.register_buffer("of the layer", torch.zeros(2))
        self.register_buffer("classes", torch.zeros(3))
        self.metric = MeanMetric()
        self.meter = Meter()
        self.count, self.words, self.nothing = 0, "before", None
        self.tensor, self.array = torch.zeros(2), np.zeros(2)
        self.outputs: list[Any] = [torch.zeros(1)]
        self.nested: dict[str, Any] = {"sums": [torch.zeros(1), 0], "n": 1}
        self.recent, self.seen = deque([1, 2], maxlen=2), {1}
        self.untouched = torch.zeros(3)

    def step(self) -> None:
        self.count += 1
        self.words, self.nothing = "after", 3
        self.tensor += 1
        self.array += 1
        self.outputs.append(torch.ones(1))
        self.nested["sums"][0] += 1
        self.nested["sums"][1] += 2
        self.nested["new"] = 5
        self.recent.append(3)
        self.seen.add(2)
        self.classes[0] += 1
        self.metric.update(2.0)
        self.meter.total += 4.0
        self.made = [1]


CHANGED = {
    *("count", "words", "nothing", "tensor", "array", "outputs", "nested", "recent", "seen"),
    *("classes", "metric.mean_value", "metric.weight", "metric._update_count", "meter.total"),
    "made",
}


def test_what_a_step_changes_is_seen_and_taken_back() -> None:
    module = Keeper()
    attributes = StepAttributes(module, [module.layer])
    taken = attributes.take()
    outputs, nested, tensor = module.outputs, module.nested, module.tensor
    assert attributes.changed(taken) == {}
    for _ in range(2):
        module.step()
        changed = attributes.changed(taken)
        assert changed.keys() == CHANGED
        assert changed["count"] == (0, 1)
        assert changed["made"] == (None, [1])
        before, after = changed["tensor"]
        assert (before.tolist(), after.tolist()) == ([0, 0], [1, 1])
        before, after = changed["nested"]
        assert (before["sums"][0].item(), after["sums"][0].item()) == (0, 1)
        before, after = changed["outputs"]
        assert after[0] is before[0]
        assert len(after) == 2
        attributes.restore(taken)
        assert attributes.changed(taken) == {}
        assert not hasattr(module, "made")
    assert module.outputs is outputs
    assert module.nested is nested
    assert module.tensor is tensor
    assert tensor.tolist() == [0, 0]


def test_values_are_assigned_where_they_were_changed() -> None:
    module, other = Keeper(), Keeper()
    attributes, others = StepAttributes(module, [module.layer]), StepAttributes(other)
    taken, buffer, outputs = attributes.take(), other.classes, other.outputs
    module.step()
    for path, (_, value) in attributes.changed(taken).items():
        others.assign(path, value)
    assert other.count == 1
    assert other.meter.total == 4.0
    assert other.made == [1]
    assert other.classes is buffer
    assert buffer.tolist() == [1, 0, 0]
    assert other.outputs is outputs
    assert other.metric.compute() == 2.0


def test_a_large_tensor_that_is_changed_where_it_is_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(step_attributes, "_CLONED_NUMEL", 1)
    module = Keeper()
    attributes = StepAttributes(module, [module.layer])
    taken = attributes.take()
    module.tensor = module.tensor + 1  # another tensor is no matter
    assert attributes.changed(taken).keys() == {"tensor"}
    module.untouched += 1
    with pytest.raises(ValueError, match=r"change 'untouched' where it is, .* Assign a new tensor"):
        attributes.changed(taken)


def test_tensors_of_inference_mode_are_known_by_their_values() -> None:
    module = Keeper()
    with torch.inference_mode():
        module.tensor = torch.zeros(2)
        attributes = StepAttributes(module, [module.layer])
        taken: Any = attributes.take()
        assert attributes.changed(taken) == {}
        kept: Tensor = module.tensor
        kept += 1
        assert attributes.changed(taken).keys() == {"tensor"}
        attributes.restore(taken)
        assert kept.tolist() == [0, 0]


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm1d(4), nn.InstanceNorm1d(4, track_running_stats=True)]
)
def test_statistics_that_count_no_change_are_put_back(norm: nn.Module) -> None:
    """torch's batch norm writes them without a new version of the tensor."""
    module = pl.LightningModule()
    module.norm = norm
    before = {name: value.clone() for name, value in module.named_buffers()}
    with StepAttributes(module).untouched():
        module.norm(torch.randn(8, 4, 3))
        assert not before["norm.running_mean"].equal(module.norm.running_mean)
    assert all(value.equal(before[name]) for name, value in module.named_buffers())
