"""Memory of our own runs, predicted and held: states, and the peak of live bytes of a whole step.

    python benchmarks/planner/memory.py             # two minutes on one core
    python benchmarks/planner/memory.py --seed 41   # other sizes; 42 is the test set
    python benchmarks/planner/memory.py --precision bf16-mixed --only "llama, AdamW"

Each run is a Trainer's, on sizes that were drawn; ``ModelSpec.from_module`` has analysed the model
at rows of 32 and 96 tokens, and the planner is told how it is trained. Measured is the third step,
from forward to update: every storage that lives, each once, whoever made it, temporary tensors of
operations and of the optimizer included. There is no clock in it: the load of the machine does not
matter. States are those of the optimizer after the run.

Bars: states 1 %, peak 5 % (aims exact and 3 %).
"""

import argparse
import logging
import os
import pickle
import platform
import random
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import lightning
import lightning.pytorch as pl
import torch
from models import language_model  # the script beside this one
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_align import (
    LISA,
    DPOModule,
    GaLoreAdamW,
    ModelSpec,
    Muon,
    ParallelSpec,
    PipelineStrategy,
    PretrainModule,
)
from lightning_align.planner.memory import memory_by_rank
from lightning_align.planner.trace import tracing

WIDTHS, BLOCKS, HEADS = (64, 128, 192, 256, 320), (4, 6, 8, 10), (2, 4, 8)
VOCABULARIES, ROWS, TOKENS = (512, 1024, 4096, 8192), (2, 4, 6), (48, 80, 112, 160, 224)
MIB, PEAK_BAR = 2**20, 0.05

# What is trained how, as the planner is told it.
CASES: dict[str, dict[str, Any]] = {
    "gpt, AdamW": {},
    "llama, AdamW": {},
    "llama, 2 micro-batches": {"accumulate": 2},
    "llama, Muon": {"optimizer": "muon"},
    "llama, GaLore": {"optimizer": "galore_adamw", "rank": 16},
    "llama, LISA 1": {"lisa_layers": 1},
    "llama, LISA 2": {"lisa_layers": 2},
    "llama, recomputed": {"activation_checkpointing": "full"},
    "gpt, recomputed": {"activation_checkpointing": "full"},
    "llama, recomputed, LISA 2": {"activation_checkpointing": "full", "lisa_layers": 2},
    "DPO, reference beside it": {"objective": "dpo"},
    "DPO, precomputed": {"objective": "dpo", "reference": "precomputed"},
    "DPO, shared prompt": {"objective": "dpo", "shared_prefix": 0.75},
    "DPO, shared, precomputed": {
        "objective": "dpo",
        "reference": "precomputed",
        "shared_prefix": 0.75,
    },
    "DPO, recomputed": {"objective": "dpo", "activation_checkpointing": "full"},
    "pipeline 1F1B": {"pipeline_parallel": 2, "schedule": "1F1B"},
    "pipeline GPipe": {"pipeline_parallel": 2, "schedule": "GPipe"},
    "pipeline interleaved": {
        "pipeline_parallel": 2,
        "schedule": "Interleaved1F1B",
        "num_model_chunks": 2,
    },
    "pipeline 1F1B, recomputed": {
        "pipeline_parallel": 2,
        "schedule": "1F1B",
        "activation_checkpointing": "full",
    },
}
MICROBATCHES = 4  # of a pipeline


@dataclass(frozen=True)
class Case:
    """A run: how, and its sizes."""

    name: str
    how: dict[str, Any] = field(hash=False)
    width: int
    blocks: int
    heads: int
    vocabulary: int
    rows: int
    tokens: int

    @property
    def pipeline(self) -> int:
        return int(self.how.get("pipeline_parallel", 1))

    @property
    def steps(self) -> int:
        return 12 if "lisa_layers" in self.how else 4

    @property
    def is_dpo(self) -> bool:
        return self.how.get("objective") == "dpo"

    @property
    def told(self) -> str:
        sizes = f"{self.blocks} x {self.width}, vocabulary {self.vocabulary}"
        return f"{sizes}, {self.rows} x {self.tokens}"

    def parallel(self, precision: str = "32-true") -> ParallelSpec:
        how = dict(self.how)
        many = how.pop("accumulate", MICROBATCHES if self.pipeline > 1 else 1)
        return ParallelSpec(
            devices=self.pipeline,
            precision=precision,
            micro_batch_size=self.rows,
            global_batch_size=many * self.rows,
            **how,
        )


def drawn(seed: int) -> Iterator[Case]:
    """One run of each kind; a kind's sizes do not depend on which others there are."""
    for name, how in CASES.items():
        draw = random.Random(f"{seed} {name}").choice
        sizes = (WIDTHS, BLOCKS, HEADS, VOCABULARIES, ROWS, TOKENS)
        yield Case(name, how, *map(draw, sizes))


def model_of(case: Case) -> Any:
    sizes = {"width": case.width, "blocks": case.blocks, "heads": case.heads}
    return language_model(
        "gpt" if case.name.startswith("gpt") else "llama", **sizes, vocabulary=case.vocabulary
    )


OPTIMIZERS: dict[str, Any] = {
    "adamw": partial(torch.optim.AdamW, lr=1e-4),
    "muon": partial(Muon, lr=1e-3),
    "galore_adamw": partial(GaLoreAdamW, lr=1e-3, rank=16),
}


def module_of(case: Case, model: Any, folder: str) -> pl.LightningModule:
    parallel = case.parallel()
    common: dict[str, Any] = {
        "optimizer": OPTIMIZERS[parallel.optimizer],
        "activation_checkpointing": parallel.activation_checkpointing == "full",
    }
    if not case.is_dpo:
        return PretrainModule(model, **common)
    if parallel.reference == "precomputed":
        common |= {"precompute_ref_log_probs": True, "ref_cache_dir": str(Path(folder, "cache"))}
    return DPOModule(model, prefix_sharing=bool(parallel.shared_prefix), **common)


class Data(pl.LightningDataModule):
    """Rows of random tokens, or pairs of them that say which completions they have."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        draw = partial(torch.randint, 1, case.vocabulary, generator=generator)
        rows = case.rows * (MICROBATCHES if case.pipeline > 1 else 1)
        self.batches: list[dict[str, Tensor]] = []
        for number in range(case.steps * case.how.get("accumulate", 1)):
            if not case.is_dpo:
                ids = draw((rows, case.tokens + 1))
                self.batches.append({"input_ids": ids, "labels": ids})
                continue
            ids = draw((2 * rows, case.tokens))
            prompt = max(1, round(case.how.get("shared_prefix", 0) * case.tokens))
            ids[rows:, :prompt] = ids[:rows, :prompt]
            completion = torch.ones_like(ids)
            completion[:, :prompt] = 0
            batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            numbers = number * rows + torch.arange(rows)
            self.batches.append({**batch, "completion_mask": completion, "number": numbers})

    def completions(self) -> list[list[tuple[Any, Any]]]:
        found = []
        for batch in self.batches:
            rows = []
            for ids, is_completion in zip(
                batch["input_ids"], batch["completion_mask"].bool(), strict=True
            ):
                rows.append((ids[~is_completion].numpy(), ids[is_completion].numpy()))
            pairs = len(rows) // 2
            found += [[rows[pair], rows[pairs + pair]] for pair in range(pairs)]
        return found

    def train_dataloader(self) -> Any:
        return DataLoader(self.batches, batch_size=None)


class Peak(pl.Callback):
    """The most bytes that live at a time in a window, which begins with a batch's forward."""

    def __init__(self, window: range) -> None:
        self.window = window
        self.peak = 0
        self._stack = ExitStack()

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx != self.window.start:
            return
        states = [v for s in trainer.optimizers[0].state.values() for v in s.values()]
        frozen = getattr(pl_module, "frozen_modules", dict)().values()
        modules = [pl_module, *frozen]
        weights = [t for m in modules for t in (*m.parameters(), *m.buffers())]
        gradients = [p.grad for p in pl_module.parameters()]
        every = (*weights, *gradients, *states, *batch.values())
        own = (Tensor, torch.nn.Parameter)  # in a pipeline hooks are lent weights of other ranks
        there = [t for t in every if type(t) in own and not t.is_meta]
        self._trace = self._stack.enter_context(tracing(pl_module, there))
        there.clear()  # gradients of the step before must not live on in it

    def on_train_batch_end(self, *args: Any) -> None:
        if args[-1] == self.window.stop - 1:
            self.peak = self._trace.storages.peak
            self._stack.close()


def states_of(trainer: pl.Trainer) -> int:
    states = [v for s in trainer.optimizers[0].state.values() for v in s.values()]
    return sum(value.nbytes for value in states if isinstance(value, Tensor))


@dataclass(frozen=True)
class Held:
    """What a rank held."""

    states: int
    peak: int


def run(case: Case, folder: str, precision: Any = "32-true") -> list[Held]:
    """By rank."""
    accumulate = case.how.get("accumulate", 1)
    # Of LISA several draws, each in its second step: states of its blocks are made in the first.
    windows = range(3, case.steps, 2) if "lisa_layers" in case.how else range(2, 3)
    peaks = [Peak(range(n * accumulate, (n + 1) * accumulate)) for n in windows]
    callbacks: list[pl.Callback] = [*peaks, Report(folder, peaks)]
    if "lisa_layers" in case.how:
        callbacks.append(LISA(case.how["lisa_layers"], interval_steps=2, filename=None))
    strategy: Any = "auto"
    if case.pipeline > 1:
        strategy = PipelineStrategy(
            schedule=case.how["schedule"],
            num_microbatches=MICROBATCHES,
            num_stages_per_rank=case.how.get("num_model_chunks", 1),
            partition_method="uniform",
            start_method="fork",
        )
    trainer = pl.Trainer(
        accelerator="cpu",
        precision=precision,
        devices=case.pipeline,
        strategy=strategy,
        max_steps=case.steps,
        max_epochs=-1,
        accumulate_grad_batches=accumulate,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
        callbacks=callbacks,
    )
    trainer.fit(module_of(case, model_of(case), folder), datamodule=Data(case))
    return [pickle.loads(Path(folder, f"{rank}").read_bytes()) for rank in range(case.pipeline)]


class Report(pl.Callback):
    """Leaves a file with what the rank held: ranks are processes."""

    def __init__(self, folder: str, peaks: list[Peak]) -> None:
        self.folder, self.peaks, self.states = folder, peaks, 0

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.states = max(self.states, states_of(trainer))

    def on_train_end(self, trainer: Any, *_: Any) -> None:
        held = Held(self.states, max(each.peak for each in self.peaks))
        Path(self.folder, f"{trainer.global_rank}").write_bytes(pickle.dumps(held))


def report(seed: int, only: str, precision: str) -> None:
    print("| run | rank | MiB of states | predicted / held | MiB at the peak | predicted / held |")
    print("|---|---:|---:|---:|---:|---:|")
    errors: dict[str, list[float]] = {"states": [], "peak": []}
    for case in drawn(seed):
        if only not in case.name:
            continue
        with tempfile.TemporaryDirectory() as folder:
            found = run(case, folder, precision)
        spec = ModelSpec.from_module(model_of(case), seq_len=case.tokens)
        predicted = memory_by_rank(spec, case.parallel(precision), is_processor=True)
        for rank, (held, parts) in enumerate(zip(found, predicted, strict=True)):
            ratios = {
                "states": parts["optimizer"] / held.states,
                "peak": sum(parts.values()) / held.peak,
            }
            for name, ratio in ratios.items():
                errors[name].append(abs(ratio - 1))
            marks = "**" * (errors["peak"][-1] > PEAK_BAR)
            cells = [
                f"{case.name}: {case.told}",
                str(rank) if case.pipeline > 1 else "",
                f"{held.states / MIB:.2f}",
                f"{ratios['states']:.4f}",
                f"{held.peak / MIB:.2f}",
                f"{marks}{ratios['peak']:.3f}{marks}",
            ]
            print(f"| {' | '.join(cells)} |", flush=True)
    for name, bar in (("states", 1), ("peak", 5)):
        worst, typical = 100 * max(errors[name]), 100 * mean(errors[name])
        print(f"\n{name}: mean {typical:.2f} %, worst {worst:.2f} % (bar {bar} %)", end="")
    print()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=42, help="of the sizes; 42 is the test set")
    parser.add_argument("--only", default="", help="runs whose name has this")
    parser.add_argument("--precision", default="32-true", help="of the Trainer")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "lightning_align"):
        logging.getLogger(name).setLevel(logging.ERROR)
    told = f"torch {torch.__version__}, lightning {lightning.__version__}, {platform.machine()}"
    print(f"{told}, 1 thread, sizes of seed {arguments.seed}\n")
    report(arguments.seed, arguments.only, arguments.precision)


if __name__ == "__main__":
    main()
