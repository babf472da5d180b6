"""What RooflineMonitor asks of a run: tokens, machine, compiled modules, figures."""

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn

from lightning_align import MachineBalance, RooflineMonitor
from lightning_align.callbacks.roofline_run import (
    Learned,
    Work,
    check_run,
    dtype_of,
    machine_of,
    module_rows,
    one_table,
    setting_of,
    values_of,
    works_of,
)
from lightning_align.planner import predict_step_time
from tests.helpers.resume import HandWritten

RUN: Any = SimpleNamespace(
    strategy=SingleDeviceStrategy("cpu"), precision="32-true", is_global_zero=True
)


class Counts(HandWritten):
    """A module that counts what it learns."""

    tokens_seen = 100


def batch(tokens: int) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.zeros(2, tokens, dtype=torch.long)}


def test_tokens_are_those_of_the_batches_of_windows_that_count() -> None:
    count = Learned(HandWritten())
    count.add(batch(3))
    count.add(batch(4))
    count.close()
    count.add(batch(50))
    count.leave_out()
    assert count.total(RUN) == {"tokens": 14}
    assert count.total(RUN) == {}  # since then
    count.add(torch.zeros(3))
    count.close()
    assert count.total(RUN) == {}  # it has none


def test_rows_of_pairs_are_two_a_pair() -> None:
    count = Learned(HandWritten())
    paired = {"input_ids": torch.zeros(6, 5), "completion_mask": torch.ones(6, 5)}
    count.add(paired)
    count.close()
    count.add({**paired, "label": torch.ones(6)})  # unpaired records
    count.close()
    assert count.total(RUN) == {"tokens": 60, "pairs": 3}


def test_a_module_that_counts_is_believed() -> None:
    module = Counts()
    count = Learned(module)
    module.tokens_seen = 140
    count.add(batch(5))
    count.close()
    assert count.total(RUN) == {"tokens": 40}
    module.tokens_seen = 180
    count.add(batch(5))
    count.close()
    count.add(batch(5))
    count.leave_out()
    assert count.total(RUN) == {"tokens": 20}  # the other half was of a step that was analysed


def test_the_machine_is_in_the_precision_of_the_run() -> None:
    module = HandWritten()
    assert dtype_of(SimpleNamespace(precision="bf16-mixed"), module) == torch.bfloat16
    assert dtype_of(SimpleNamespace(precision="16-true"), module) == torch.float16
    assert dtype_of(RUN, module) == torch.float32
    assert machine_of(RUN, module, "h100-sxm").dtype == "float32"
    half = SimpleNamespace(**{**vars(RUN), "precision": "bf16-true"})
    assert machine_of(half, module, "h100-sxm").peak_flops == 989.4e12
    own = MachineBalance("m", 1.0, 1.0)
    assert machine_of(RUN, module, own) is own


def test_a_module_may_have_a_precision_of_its_own() -> None:
    """As with dtype="bfloat16", and norms or adapters that are not."""
    module = HandWritten().to(torch.bfloat16)
    module.body.float()
    assert dtype_of(RUN, module) == torch.bfloat16
    assert machine_of(RUN, module, "h100-sxm").peak_flops == 989.4e12
    assert dtype_of(RUN, LightningModule()) == torch.float32


def step() -> Any:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
    hardware = MachineBalance("m", 1e6, 1e6)
    return predict_step_time(model, lambda: model(torch.ones(4, 8)).mean(), hardware)


def works(**options: Any) -> list[Work]:
    run: Any = SimpleNamespace(**vars(RUN), distributed_sampler_kwargs=None, world_size=1)
    return works_of(run, step(), **{"top_k": 2, **options})


def test_utilisation_is_of_one_device() -> None:
    """Two products of 4 x 8 x 8: forward, and for the weight; 1024 FLOPs in 2 ms."""
    values = values_of(works(), 2e-3, 1e6)
    assert values["mfu"] == pytest.approx(2 * 2 * 4 * 8 * 8 / 2e-3 / 1e6)


def test_stages_of_a_model_are_one_step() -> None:
    """FLOPs add up, and so do peaks; memory is that of the fullest rank."""
    (one,) = works()
    other = one._replace(model_flops=3 * one.model_flops, peak_bytes=2 * one.peak_bytes)
    alone, both = values_of([one], 2e-3, 1e6), values_of([one, other], 2e-3, 1e6)
    assert both["mfu"] == pytest.approx(2 * alone["mfu"])
    assert both["tflop"] == pytest.approx(2 * alone["tflop"])
    assert both["intensity"] == pytest.approx(alone["intensity"])
    assert both["peak_gb"] == 2 * alone["peak_gb"]
    table = one_table([one, other])
    assert [(row["rank"], row["module"]) for row in table] == [
        (0, "(all)"),
        (0, "0"),
        (1, "(all)"),
        (1, "0"),
    ]
    assert "rank" not in one_table([one])[0]


def test_rows_of_the_table_are_those_that_take_longest() -> None:
    rows = module_rows(step(), 2)
    assert [row["module"] for row in rows] == ["(all)", "0"]
    assert rows[0]["share"] == pytest.approx(1)
    assert works(top_k=0)[0].rows == []


@pytest.mark.parametrize(("fused", "can"), [(None, True), (True, False)])
def test_what_advice_has_to_know(fused: bool | None, can: bool) -> None:
    optimizer = torch.optim.AdamW(nn.Linear(2, 2).parameters(), fused=fused)
    run: Any = SimpleNamespace(
        **vars(RUN),
        optimizers=[optimizer],
        train_dataloader=SimpleNamespace(num_workers=3),
        distributed_sampler_kwargs=None,
        world_size=1,
    )
    setting = setting_of(run, {"step_s": 2.0, "data_share": 0.25, "mfu": 0.1}, 4)
    assert setting.measured == {"data": 0.5}
    assert (setting.can_fuse, setting.num_workers, setting.micro_batches) == (can, 3, 4)
    run.optimizers = [torch.optim.Rprop(nn.Linear(2, 2).parameters())]
    assert not setting_of(run, {}, 0).can_fuse  # it has no fused update


def test_a_compiled_module_is_warned_of() -> None:
    module, run = HandWritten(), SimpleNamespace(**vars(RUN), callbacks=[])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_run(run, module, RooflineMonitor)
    module.head = torch.compile(module.head, backend="eager")
    with pytest.warns(UserWarning, match="round otherwise than compiled ones"):
        check_run(run, module, RooflineMonitor)
