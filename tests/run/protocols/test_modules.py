"""Questions of a LightningModule, and names that are nearly what is asked."""

from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lightning_align.run.protocols import frozen_modules, loss_is_sum, misspelt, window_sums
from lightning_align.strategies.pipeline.checks import check_module
from tests.helpers.answers import dpo, trainer_of
from tests.helpers.pipelines import Chained


def test_a_module_that_knows_nothing_of_us() -> None:
    module = pl.LightningModule()
    assert window_sums(module) == {}
    assert frozen_modules(module) == {}
    assert not loss_is_sum(module)
    module.accumulated = 3  # type: ignore[assignment]  # of its own, and none of these sums
    assert window_sums(module) == {}


def test_a_module_of_ours() -> None:
    module: Any = dpo()
    module.accumulated["loss"] = torch.ones(2)
    assert window_sums(module) is module.accumulated
    assert frozen_modules(module) == {"reference": module.reference_layers.model}
    assert loss_is_sum(module)


class Misspelt(Chained):
    pipeline_layer_costs = 3  # another word

    def pipeline_microbatch_weigth(self, batch: Any) -> int:
        return len(batch)


def test_a_misspelt_name_is_noticed() -> None:
    assert misspelt(Chained()) == {}
    module = Misspelt()
    assert misspelt(module) == {"pipeline_microbatch_weigth": "pipeline_microbatch_weight"}
    module.pipeline_refusl = "no"
    assert misspelt(module)["pipeline_refusl"] == "pipeline_refusal"


def test_a_pipeline_warns_of_a_misspelt_name() -> None:
    expected = r"Misspelt.pipeline_microbatch_weigth is not asked for\. Is it meant as pipeline_mic"
    with pytest.warns(UserWarning, match=expected):
        check_module(trainer_of(), Misspelt())
