"""What ZeRO-Infinity refuses, before it has trained or overwritten anything."""

from functools import partial

import pytest
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.plugins import MixedPrecision
from torch.utils.checkpoint import checkpoint

from lightning_align.strategies import ZeROInfinityStrategy
from tests.helpers.offloaded import ADAMW, Regression, compare, fit, points, small

SCALED = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))


def refused(tmp_path, match, module=None, strategy=None, **options):
    data = points()
    with pytest.raises(ValueError, match=match):
        fit(tmp_path, module or Regression(), data, strategy or small(), **options)


class Manual(Regression):
    def __init__(self):
        super().__init__(ADAMW)
        self.automatic_optimization = False


class Several(Regression):
    def configure_optimizers(self):
        return [torch.optim.SGD(self.inlet.parameters()), torch.optim.SGD(self.parts.parameters())]


class Sparse(Regression):
    def __init__(self):
        super().__init__(ADAMW)
        self.table = torch.nn.Embedding(5, 4, sparse=True)


class Reentrant(Regression):
    """Recomputes its blocks in a backward within backward."""

    def forward(self, x):
        x = self.inlet(x)
        for part in self.parts:
            x = x + checkpoint(part, x, use_reentrant=True)
        return self.outlet(self.norm(x))


@pytest.mark.parametrize("options", [{}, {"gradient_clip_val": 0.05}], ids=["early", "waits"])
def test_reentrant_checkpointing(tmp_path, options):
    data = points()
    compare(tmp_path, Reentrant, data, **options)


@pytest.mark.parametrize(
    ("module", "match"),
    [
        (Sparse, "gradients of its 'table' are sparse"),
        (Manual, "optimizes manually"),
        (partial(Several, None), "must have one optimizer"),
        (partial(Regression, torch.optim.LBFGS), "optimizer='LBFGS'.*each parameter by itself"),
        (partial(Regression, torch.optim.Adagrad), "optimizer='Adagrad'"),
    ],
    ids=["sparse", "manual", "several", "LBFGS", "Adagrad"],
)
def test_modules(tmp_path, module, match):
    refused(tmp_path, match, module())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"precision": "16-true"}, "precision='16-true'"),
        ({"plugins": [SCALED]}, "precision='16-mixed'.*a loss scaler looks at all gradients"),
        ({"callbacks": [StochasticWeightAveraging(1e-2)]}, "StochasticWeightAveraging"),
    ],
    ids=["16-true", "16-mixed", "averaging"],
)
def test_trainers(tmp_path, options, match):
    refused(tmp_path, match, **options)


@pytest.mark.parametrize(
    "arguments",
    [
        {"params_buffer_count": 1},
        {"sub_group_size": 0},
        {"memory_limit": "four"},
        {"memory_limit": "4XB"},
        {"thread_count": 0},
        {"block_size": 1000},
        {"offload_activations": "disk"},
    ],
    ids=str,
)
def test_arguments(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        ZeROInfinityStrategy(**arguments)
