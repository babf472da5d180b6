"""Bytes of a rank: Megatron's figures, and real steps of each technique."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader

from lightning_align import (
    LISA,
    DPOModule,
    GaLoreAdamW,
    Muon,
    PipelineStrategy,
    PretrainModule,
    build_param_groups,
    find_layers,
)
from lightning_align.layers.recompute import checkpoint_blocks
from lightning_align.planner import ModelSpec, ParallelSpec
from lightning_align.planner.memory import (
    device_memory,
    elsewhere,
    memory_by_rank,
    saved_by_rank,
)
from lightning_align.planner.model_spec import count
from lightning_align.planner.states import state_bytes
from lightning_align.planner.trace import tracing
from tests.helpers.live_peak import LivePeak, there_before
from tests.helpers.ranks import ForkedRanks, run_ranks
from tests.helpers.step_models import gpt, llama
from tests.helpers.tiny_models import TINY_MODELS

GIB = 2**30
MEGATRON = {"precision": "16-master", "chunked_loss": False}
MODEL = ModelSpec(8, 64, 4, vocab_size=1000, seq_len=32, tied_embeddings=False)


@pytest.mark.parametrize(
    ("sizes", "split", "none", "selective"),
    [
        # blocks, width, heads; ranks of the pipeline, chunks, batch, micro-batch; GiB of Figure 1
        ((48, 6144, 64), (1, 1, 4, 4), 59.25, 9.5625),
        ((96, 12288, 96), (8, 3, 64, 1), 66.84375, 12.3515625),
        ((105, 20480, 128), (35, 3, 280, 1), 114.0234375, 23.076171875),
        ((128, 25600, 160), (64, 1, 512, 1), 131.25, 26.5625),
    ],
)
def test_activations_of_megatron(
    sizes: tuple[int, int, int],
    split: tuple[int, int, int, int],
    none: float,
    selective: float,
) -> None:
    """Blocks of the first rank, without and with sequence parallelism and selective recomputation.

    Interleaving holds 1 + (p - 1) / (p m) times as many (arXiv:2205.05198, section 4.2.3).
    """
    pp, chunks, batch, micro = split
    model = ModelSpec(*sizes, vocab_size=51200, seq_len=2048, attention="unfused", dropout=True)
    spec = ParallelSpec(
        devices=8 * pp,
        tensor_parallel=8,
        pipeline_parallel=pp,
        num_model_chunks=chunks,
        schedule="Interleaved1F1B" if chunks > 1 else "1F1B",
        micro_batch_size=micro,
        global_batch_size=batch,
        **MEGATRON,
    )
    recomputing = replace(spec, sequence_parallel=True, activation_checkpointing="selective")
    s, h = 2048, sizes[1]
    # What else the first rank holds of each micro-batch that its first stage has in flight (two
    # rounds where stages are interleaved): a mask of dropout and 8 bytes a token; without a
    # pipeline also norm, head and logits.
    held = 2 * pp if chunks > 1 else pp
    for each, expected, narrow in ((spec, none, 1), (recomputing, selective, 8)):
        beside = held * micro * s * (h / narrow + 8)
        if pp == 1:
            beside += micro * s * (4 * h / narrow + 4 * 51200 / 8)
        ours = (saved_by_rank(model, each)[0] - beside) / GIB
        assert ours == pytest.approx(expected, rel=0.01)


def total(**given: object) -> float:
    return sum(device_memory(MODEL, ParallelSpec(**given)).values())  # type: ignore[arg-type]


def test_weights_gradients_and_moments_are_sixteen_bytes_a_parameter() -> None:
    parts = device_memory(MODEL, ParallelSpec(precision="32-true"))
    n = MODEL.parameters
    assert (parts["weights"], parts["gradients"]) == (4 * n, 4 * n)
    assert parts["optimizer"] == pytest.approx(8 * n, rel=1e-3)


def test_zero_divides_what_its_stage_says() -> None:
    eight = [device_memory(MODEL, ParallelSpec(devices=8, zero_stage=stage)) for stage in range(4)]
    plain = eight[0]
    assert eight[1]["optimizer"] == plain["optimizer"] / 8  # of embedding and head, too
    assert eight[1]["gradients"] == plain["gradients"] > eight[2]["gradients"]
    assert eight[2]["weights"] == plain["weights"] > eight[3]["weights"]


def test_what_lies_elsewhere_is_not_on_the_device() -> None:
    spec = ParallelSpec(zero_stage=3, offload_param="nvme", offload_optimizer="cpu")
    near, far = device_memory(MODEL, spec), elsewhere(MODEL, spec)
    plain = device_memory(MODEL, ParallelSpec())
    assert near["weights"] < plain["weights"]
    assert near["optimizer"] < plain["optimizer"] / 2
    assert far["nvme"] > plain["weights"] / 3
    assert far["cpu"] > 2 * far["nvme"]  # moments and gradients


def test_a_step_is_on_drives_twice_and_states_lie_where_they_are_stepped() -> None:
    """With everything on drives; what stays in memory is there, too, for a run that resumes."""
    spec = ParallelSpec(
        precision="32-true", zero_stage=3, offload_param="nvme", offload_optimizer="nvme"
    )
    shapes = MODEL.first_shapes + MODEL.num_layers * MODEL.block_shapes + MODEL.last_shapes
    whole = 4 * MODEL.parameters + state_bytes(shapes, spec)
    assert elsewhere(MODEL, spec)["nvme"] == 2 * whole
    assert device_memory(MODEL, spec)["optimizer"] == 0
    waits = elsewhere(MODEL, replace(spec, global_batch_size=2))
    assert waits["nvme"] == 2 * whole + 4 * MODEL.num_layers * count(MODEL.block_shapes)
    once = elsewhere(MODEL, replace(spec, offload_param="cpu"))
    assert once["nvme"] == state_bytes(shapes, spec)


def test_what_stays_on_devices_is_beside_the_states_that_are_stepped_in_host_memory() -> None:
    """Of each rank, whole (docs/zero_infinity.md: On a GPU)."""
    spec = ParallelSpec(devices=2, zero_stage=2, offload_optimizer="cpu", precision="32-true")
    away = replace(spec, zero_stage=3, offload_param="cpu")
    copies = [
        elsewhere(MODEL, each, on_device=True)["cpu"] - elsewhere(MODEL, each)["cpu"]
        for each in (spec, away)
    ]
    blocks = MODEL.num_layers * count(MODEL.block_shapes)
    assert copies == [2 * 4 * MODEL.parameters, 2 * 4 * (MODEL.parameters - blocks)]


def test_techniques_that_save_memory_do() -> None:
    plain = total()
    assert total(optimizer="muon") < plain
    assert total(optimizer="galore_adamw", rank=4) < plain
    assert total(lisa_layers=2) < plain
    assert total(precision="bf16-true") < plain
    long = replace(MODEL, seq_len=4096)
    some, none = (
        device_memory(long, ParallelSpec(activation_checkpointing=kind))["activations"]
        for kind in ("full", "none")
    )
    assert some < none / 4


def test_a_reference_is_a_second_set_of_weights() -> None:
    parts = device_memory(MODEL, ParallelSpec(objective="dpo"))
    assert parts["reference"] == parts["weights"]
    precomputed = device_memory(MODEL, ParallelSpec(objective="dpo", reference="precomputed"))
    assert "reference" not in precomputed


def test_ranks_of_a_pipeline_hold_their_own_layers() -> None:
    spec = ParallelSpec(devices=4, pipeline_parallel=4, global_batch_size=8)
    ranks = memory_by_rank(MODEL, spec)
    assert len(ranks) == 4
    assert sum(parts["weights"] for parts in ranks) == 4 * MODEL.parameters
    assert ranks[0]["activations"] > ranks[2]["activations"]  # four micro-batches against two


RUNS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "gpt": (gpt, torch.optim.AdamW, {"optimizer": "adamw"}),
    "llama": (llama, torch.optim.AdamW, {"optimizer": "adamw"}),
    "muon": (llama, Muon, {"optimizer": "muon"}),
    "galore": (llama, partial(GaLoreAdamW, rank=8), {"optimizer": "galore_adamw", "rank": 8}),
    "recomputed": (
        llama,
        torch.optim.AdamW,
        {"optimizer": "adamw", "activation_checkpointing": "full"},
    ),
}


BY_DEFAULT = ("llama", "galore")  # each is a second; the others are of the slow ones


@pytest.mark.parametrize(
    "name",
    [name if name in BY_DEFAULT else pytest.param(name, marks=pytest.mark.slow) for name in RUNS],
)
def test_the_peak_of_real_steps_at_sizes_that_were_not_analysed(name: str) -> None:
    """In the order of Lightning: gradients of the step before go after the next forward.

    Everything counts, also what is there for a moment only, inside of operations and while blocks
    are recomputed.
    """
    build, make, given = RUNS[name]
    model, rows, tokens = build(), 5, 60
    parallel = ParallelSpec(precision="32-true", chunked_loss=False, micro_batch_size=rows, **given)
    parts = device_memory(ModelSpec.from_module(model, seq_len=tokens), parallel)

    if name == "recomputed":
        checkpoint_blocks(find_layers(model))
    optimizer = make(build_param_groups(model), lr=1e-4)
    ids = torch.randint(0, 200, (rows, tokens + 1), generator=torch.Generator().manual_seed(0))

    def step() -> None:
        found = model(ids[:, :-1])
        logits = found if isinstance(found, Tensor) else found.logits
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    step()
    step()
    there = there_before([model], optimizer, ids)
    with tracing(model, there) as trace:
        there.clear()
        step()
    assert sum(parts.values()) == pytest.approx(trace.storages.peak, rel=0.05)


SIZES = {"hidden_size": 96, "intermediate_size": 256, "vocab_size": 600, "num_hidden_layers": 4}


def test_gradients_stay_where_a_processor_updates_them() -> None:
    """In host memory alone, with states beside them, nothing moves."""
    spec = ParallelSpec(
        zero_stage=3, offload_param="cpu", offload_optimizer="cpu", precision="32-true"
    )

    def gradients(parallel: ParallelSpec, is_processor: bool) -> float:
        return device_memory(MODEL, parallel, is_processor=is_processor)["gradients"]

    block = 4 * count(MODEL.block_shapes)
    more = gradients(spec, True) - gradients(spec, False)
    assert more >= (MODEL.num_layers - 3) * block > 0
    plain = replace(spec, zero_stage=0, offload_param="none", offload_optimizer="none")
    assert gradients(spec, True) == gradients(plain, True)
    on_drive = replace(spec, offload_optimizer="nvme")
    assert gradients(on_drive, True) == gradients(on_drive, False)


MODULES: dict[str, dict[str, Any]] = {
    "llama": {},
    "lisa": {"lisa_layers": 1},
    "dpo": {"objective": "dpo"},
    "precomputed": {"objective": "dpo", "reference": "precomputed"},
    "shared": {"objective": "dpo", "shared_prefix": 0.75},
    "dpo, recomputed": {"objective": "dpo", "activation_checkpointing": "full"},
    "1F1B": {"pipeline_parallel": 2, "schedule": "1F1B"},
    "GPipe": {"pipeline_parallel": 2, "schedule": "GPipe"},
    "interleaved": {
        "pipeline_parallel": 2,
        "schedule": "Interleaved1F1B",
        "num_model_chunks": 2,
    },
}
MICRO_BATCH, MICRO_BATCHES, TOKENS, STEPS = 4, 4, 80, 3


class Rows(pl.LightningDataModule):
    """Random rows, or pairs of which a share is the same, that say which completions they have."""

    def __init__(self, parallel: ParallelSpec) -> None:
        super().__init__()
        rows, is_dpo = parallel.batch_size, parallel.objective == "dpo"
        generator = torch.Generator().manual_seed(0)
        self.batches = []
        for number in range(STEPS + 3):
            size = (rows * (1 + is_dpo), TOKENS + (not is_dpo))
            ids = torch.randint(1, 600, size, generator=generator)
            batch = {"input_ids": ids, "labels": ids}
            if is_dpo:
                prompt = max(1, round(parallel.shared_prefix * TOKENS))
                ids[rows:, :prompt] = ids[:rows, :prompt]
                completion = torch.ones_like(ids)
                completion[:, :prompt] = 0
                batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
                batch["completion_mask"] = completion
                batch["number"] = number * rows + torch.arange(rows)
            self.batches.append(batch)

    def completions(self) -> list[list[tuple[Any, Any]]]:
        found = []
        for batch in self.batches:
            rows = [
                (ids[~mask].numpy(), ids[mask].numpy())
                for ids, mask in zip(
                    batch["input_ids"], batch["completion_mask"].bool(), strict=True
                )
            ]
            found += [list(pair) for pair in zip(*batched(rows), strict=True)]
        return found

    def train_dataloader(self) -> Any:
        return DataLoader(self.batches, batch_size=None)


def batched(rows: list[Any]) -> tuple[list[Any], list[Any]]:
    return rows[: len(rows) // 2], rows[len(rows) // 2 :]


def module_of(parallel: ParallelSpec, folder: Path) -> pl.LightningModule:
    recomputes = parallel.activation_checkpointing == "full"
    if parallel.objective != "dpo":
        return PretrainModule(TINY_MODELS["llama"](**SIZES), activation_checkpointing=recomputes)
    options: dict[str, Any] = {"prefix_sharing": bool(parallel.shared_prefix)}
    if parallel.reference == "precomputed":
        options |= {"precompute_ref_log_probs": True, "ref_cache_dir": str(folder)}
    model = TINY_MODELS["llama"](**SIZES)
    return DPOModule(model, activation_checkpointing=recomputes, **options)


def held(parallel: ParallelSpec, folder: Path, rank: int | None = None) -> tuple[int, int]:
    """Bytes of states, and the peak of a step; of LISA, whose draws differ, the most of some.

    Its blocks have their states from the first step of an interval on.
    """
    steps = range(3, STEPS + 3, 2) if parallel.lisa_layers else range(2, STEPS)
    peaks = [LivePeak(number) for number in steps]
    callbacks: list[pl.Callback] = [*peaks]
    if parallel.lisa_layers:
        callbacks.append(LISA(parallel.lisa_layers, interval_steps=2, filename=None))
    spread: dict[str, Any] = {}
    if rank is not None:
        strategy = PipelineStrategy(
            schedule=parallel.schedule,
            num_microbatches=MICRO_BATCHES,
            num_stages_per_rank=parallel.chunks,
            partition_method="uniform",
        )
        spread = {"devices": 2, "strategy": strategy, "plugins": [ForkedRanks(rank, 2)]}
    trainer = pl.Trainer(
        accelerator="cpu",
        precision=parallel.precision,
        max_steps=steps.stop,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
        default_root_dir=str(folder),
        **{"devices": 1, **spread},
    )
    trainer.fit(module_of(parallel, folder), datamodule=Rows(parallel))
    return max(each.states for each in peaks), max(each.peak for each in peaks)


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("shared", "32-true"),
        ("llama", "bf16-true"),
        pytest.param("llama", "bf16-mixed", marks=pytest.mark.slow),
        *(
            pytest.param(name, "32-true", marks=pytest.mark.slow)
            for name in MODULES
            if name != "shared"
        ),
    ],
)
def test_what_our_own_runs_hold(name: str, precision: Any, tmp_path: Path) -> None:
    """Of each rank: states to the byte, and the peak of a whole step, temporary tensors and all."""
    pp = MODULES[name].get("pipeline_parallel", 1)
    many = MICRO_BATCHES if pp > 1 else 1
    parallel = ParallelSpec(
        devices=pp,
        precision=precision,
        micro_batch_size=MICRO_BATCH,
        global_batch_size=MICRO_BATCH * many,
        **MODULES[name],
    )
    spec = ModelSpec.from_module(TINY_MODELS["llama"](**SIZES), seq_len=TOKENS)
    found = [held(parallel, tmp_path)] if pp == 1 else run_ranks(partial(held, parallel, tmp_path))
    planned = memory_by_rank(spec, parallel, is_processor=True)
    for (states, peak), parts in zip(found, planned, strict=True):
        assert parts["optimizer"] == states
        assert sum(parts.values()) == pytest.approx(peak, rel=0.05)
