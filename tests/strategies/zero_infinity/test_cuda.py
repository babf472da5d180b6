"""ZeRO-Infinity on a GPU against the same training in its memory.

The optimizer steps on the host here and on the GPU there, so runs are compared in double precision.
None of this has been run so far, for want of a GPU; ``test_on_device`` runs all but the streams.
"""

import json
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_align.modules import PretrainModule
from lightning_align.offload import activations
from lightning_align.strategies import ZeROInfinityStrategy
from tests.helpers.offloaded import Both, Regression, points, text
from tests.helpers.tiny_models import TINY_MODELS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.filterwarnings("ignore:.*has not been run yet"),
]

HOST = {"offload_params_device": "cpu", "offload_optimizer_device": "cpu"}
SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
PLACES = {
    "nvme": {},
    "cpu": HOST,
    "none": {"offload_params_device": "none"},
    "stage 2": {"stage": 2},
    "stage 1": {"stage": 1},
}


def fit(tmp_path, module, data, strategy, devices=1, **options):
    pl.seed_everything(11)
    trainer = pl.Trainer(
        accelerator="gpu",
        devices=devices,
        strategy=strategy,
        default_root_dir=tmp_path,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"precision": "64-true", **options},
    )
    trainer.fit(module, data)
    return trainer


def compare(tmp_path, build, data, strategy, atol=1e-9, **options):
    found = []
    for each in ("auto", strategy):
        trainer = fit(tmp_path, build(), data, each, **options)
        state = trainer.strategy.lightning_module_state_dict()
        found.append({name: value.cpu().clone() for name, value in state.items()})
        found[-1]["loss"] = trainer.callback_metrics["loss"].cpu()
    strategy.close()
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=0, atol=atol, msg=name)


def doubles():
    return DataLoader([(x.double(), y.double()) for x, y in points().dataset], batch_size=8)


@pytest.mark.parametrize(
    "options",
    [{}, {"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.05}],
    ids=["plain", "accumulated", "clipped"],
)
@pytest.mark.parametrize("arguments", PLACES.values(), ids=PLACES)
def test_a_module_trains_as_in_memory(tmp_path, arguments, options):
    strategy = ZeROInfinityStrategy(params_buffer_count=3, **arguments)
    compare(tmp_path, partial(Regression, SGD), doubles(), strategy, **options)


@pytest.mark.parametrize("where", ["none", "cpu", "nvme"])
def test_language_models_train_as_in_memory(tmp_path, monkeypatch, where):
    monkeypatch.setattr(activations, "LEAST_BYTES", 1000)
    build = partial(torch.optim.AdamW, lr=1e-3)

    def module():
        model = TINY_MODELS["llama_tied"]()
        return PretrainModule(model, optimizer=build, activation_checkpointing=where != "none")

    strategy = ZeROInfinityStrategy(offload_activations=where)
    data = Both(text())
    options = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5, "val_check_interval": 4}
    compare(tmp_path, module, data, strategy, 1e-7, **options)


def test_bf16_mixed(tmp_path):
    """A parameter that differs in its last bit may be rounded to another neighbour in bf16."""
    data = points()
    build = partial(Regression, partial(torch.optim.SGD, lr=1e-3))
    compare(tmp_path, build, data, ZeROInfinityStrategy(), 1e-3, precision="bf16-mixed")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_two_ranks_train_as_ddp(tmp_path):
    found = []
    for strategy in ("ddp_spawn", ZeROInfinityStrategy(start_method="spawn")):
        module = Regression(SGD)
        fit(tmp_path, module, doubles(), strategy, devices=2)
        found.append(module.state_dict())
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name].cpu(), value.cpu(), rtol=0, atol=1e-9, msg=name)


class Deep(pl.LightningModule):
    """Blocks of 16 MiB, and one of many products for each of which compute lasts."""

    def __init__(self, depth=48, width=2048, products=1):
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.products = products

    def training_step(self, batch, batch_idx):
        x = batch
        for part in self.parts:
            for _ in range(self.products):
                x = part(x).tanh()
        return x.square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def rows(count, width=2048):
    return DataLoader(torch.randn(2 * count, width), batch_size=count)


def test_the_gpu_holds_a_few_blocks(tmp_path):
    module = Deep()
    whole = sum(p.nbytes for p in module.parameters())
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    trainer = fit(tmp_path, module, rows(8), ZeROInfinityStrategy(**HOST), precision="32-true")
    assert torch.cuda.max_memory_allocated() < whole / 3  # some of it is cuBLAS' workspace
    trainer.strategy.close()
    assert all(parameter.device.type == "cpu" for parameter in module.parameters())


def test_copies_are_beside_compute(tmp_path):
    """By the profiler's times: on streams of their own, and some while kernels run."""
    module, trace = Deep(depth=8, products=20), tmp_path / "trace.json"
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        strategy = ZeROInfinityStrategy(params_buffer_count=3, **HOST)
        fit(tmp_path, module, rows(4096), strategy, precision="32-true")
    profile.export_chrome_trace(str(trace))
    events = json.loads(trace.read_text())["traceEvents"]
    kernels = [event for event in events if event.get("cat") == "kernel"]
    copies = [event for event in events if event.get("cat") == "gpu_memcpy"]
    large = [event for event in copies if event["args"]["bytes"] >= 16 << 20]
    compute = {event["args"]["stream"] for event in kernels}
    for way in ("HtoD", "DtoH"):
        found = [event for event in large if way in event["name"]]
        assert found
        assert not compute & {event["args"]["stream"] for event in found}
        assert any(
            kernel["ts"] < copy["ts"] + copy["dur"] and copy["ts"] < kernel["ts"] + kernel["dur"]
            for copy in found
            for kernel in kernels
        )
