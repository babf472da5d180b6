"""Causes: incidents planted in small Llamas, and whether SpikeGuard names what was done.

    python benchmarks/spikes/causes.py               # 5 seeds, a few minutes on one core
    python benchmarks/spikes/causes.py --design      # the seeds that the rules were made on
    python benchmarks/spikes/causes.py --foreign     # a module that cannot tell a batch's loss

A Llama of 4 blocks and width 32 learns to write Pride and Prejudice byte by byte, with AdamW at
3e-3 and beta2 0.999. From a checkpoint of step 120 each run goes on, and one thing is done to it at
a step that the seed draws. The first alarm from there on is the incident, and the guard, at its
defaults, names the cause and the layer before the step is taken. What raises no alarm is no
incident; it is counted apart.
"""

from __future__ import annotations

import argparse
import logging
import lzma
import math
import random
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader
from transformers import LlamaConfig

from lightning_align import PretrainModule, SpikeGuard
from lightning_align.data.corpora import embedded_path
from lightning_align.spike_incidents import Incident

SEEDS, DESIGN_SEEDS = range(5), range(100, 105)
ROWS, LENGTH, BLOCKS, VOCABULARY = 8, 48, 4, 128
BASE = 120  # steps before the checkpoint that all runs of a seed begin from
FIRST, LAST, WAIT = 150, 165, 15  # steps: what is planted between, and how long an alarm may take
QUIET, LOUD = 0.02, 20.0  # times the usual gradients


def batches(seed: int, count: int) -> list[dict[str, torch.Tensor]]:
    with lzma.open(embedded_path("pride_and_prejudice")) as file:
        text = file.read()
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long().clamp(max=127)
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(tokens) - LENGTH, (count, ROWS), generator=generator)
    return [of_rows(tokens[start[:, None] + torch.arange(LENGTH)]) for start in starts]


def of_rows(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"input_ids": ids, "labels": ids.clone()}


# What is done to the data: a batch and the seed's generator -> another batch


def degenerate(batch: dict[str, torch.Tensor], draw: random.Random) -> dict[str, torch.Tensor]:
    return of_rows(torch.full_like(batch["input_ids"], draw.randrange(97, 123)))


def shuffled(batch: dict[str, torch.Tensor], draw: random.Random) -> dict[str, torch.Tensor]:
    order = torch.tensor(draw.sample(range(LENGTH), LENGTH))
    return of_rows(batch["input_ids"][:, order])


def foreign(batch: dict[str, torch.Tensor], draw: random.Random) -> dict[str, torch.Tensor]:
    """Every letter stands for another one."""
    letters = list(range(97, 123))
    cipher = torch.arange(VOCABULARY)
    cipher[97:123] = torch.tensor(draw.sample(letters, len(letters)))
    return of_rows(cipher[batch["input_ids"]])


def wrong_labels(batch: dict[str, torch.Tensor], draw: random.Random) -> dict[str, torch.Tensor]:
    return {**batch, "labels": batch["labels"].roll(draw.randrange(1, ROWS), dims=0)}


Change = Callable[[Any, Any, dict[str, torch.Tensor]], None]  # of trainer, module or batch


class Plant(pl.Callback):
    """Does one thing to a run at a batch of a step; the first alarm from there on ends it."""

    def __init__(self, guard: SpikeGuard, step: int, number: int, what: Change) -> None:
        self.guard, self.step, self.number, self.what = guard, step, number, what
        self.incident: Incident | None = None
        self.false_alarms = 0

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        number = batch_idx % trainer.accumulate_grad_batches
        if trainer.global_step == self.step and number == self.number:
            with torch.no_grad():
                self.what(trainer, module, batch)

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        found = self.guard.report.incidents
        self.false_alarms = sum(each.step < self.step for each in found)
        later = [each for each in found if each.step >= self.step]
        if later:
            self.incident = later[0]
        trainer.should_stop = bool(later)


def scale_lr(factor: float, trainer: Any, *_: Any) -> None:
    for group in trainer.optimizers[0].param_groups:
        group["lr"] *= factor


def in_block(
    number: int, change: Callable[[torch.Tensor], Any], _trainer: Any, module: Any, _batch: Any
) -> None:
    for weight in module.layers.blocks[number].parameters():
        if weight.dim() == 2:
            change(weight)


def one_weight(number: int, value: float, _trainer: Any, module: Any, _batch: Any) -> None:
    module.layers.blocks[number].mlp.down_proj.weight[3, 5] = value


def nothing(*_: Any) -> None:
    """What is planted is in the gradients."""


def in_data(other: Any, draw: random.Random, _trainer: Any, _module: Any, batch: Any) -> None:
    batch.update(other(batch, draw))


def scale_gradients(
    part: Any, factor: Callable[[int], float], module: pl.LightningModule | None = None
) -> None:
    """Multiply the gradients of a part of a module by a function of the step."""
    whole = module or part
    for parameter in part.parameters():
        parameter.register_hook(lambda gradient: gradient * factor(whole.trainer.global_step))


# Name -> cause that is to be named
PLANTED = {
    "degenerate batch": "data",
    "shuffled text": "data",
    "foreign text": "data",
    "labels of other rows": "data",
    "degenerate, one batch of two": "data",
    "lr times 10": "learning rate",
    "lr times 30": "learning rate",
    "quiet, then large gradients": "stale second moment",
    "large gradients in a block": "stale second moment",
    "a block times 8": "numerics",
    "a block times -1": "numerics",
    "a corrupted weight": "numerics",
    "NaN in a block": "numerics",
}
DATA = {
    "degenerate batch": degenerate,
    "shuffled text": shuffled,
    "foreign text": foreign,
    "labels of other rows": wrong_labels,
    "degenerate, one batch of two": degenerate,
}


def build(has_batch_loss: bool) -> PretrainModule:
    return (PretrainModule if has_batch_loss else Plain)(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=BLOCKS,
            num_attention_heads=2,
            max_position_embeddings=LENGTH,
        ),
        optimizer=partial(torch.optim.AdamW, lr=3e-3, betas=(0.9, 0.999), weight_decay=0.1),
    )


def make_trainer(folder: str, *callbacks: Any, **options: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **options,
    )


def make_guard() -> SpikeGuard:
    guard = SpikeGuard(action="skip", report_dir="spikes")  # figures by layer are collected
    guard.report._write_files = lambda *_: None  # type: ignore[method-assign]
    return guard


def base(folder: str, seed: int, is_quiet: bool) -> str:
    """The checkpoint that runs of a seed begin from; trains it if nobody has."""
    path = f"{folder}/{seed}{'_quiet' if is_quiet else ''}.ckpt"
    if not Path(path).exists():
        pl.seed_everything(seed, verbose=False)
        module = build(True)
        if is_quiet:
            scale_gradients(module, lambda _: QUIET)
        trainer = make_trainer(folder, make_guard(), SaveAt(path), max_steps=BASE + 1)
        trainer.fit(module, DataLoader(batches(seed, 2 * LAST), batch_size=None))
    return path


class SaveAt(pl.Callback):
    """Writes a checkpoint when the base is there."""

    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == BASE:
            trainer.save_checkpoint(self.path)


def run(name: str, seed: int, has_batch_loss: bool, folder: str) -> dict[str, Any]:
    """Plant one incident; what was named, and what is right."""
    draw = random.Random(f"{name}{seed}")
    step, block = draw.randrange(FIRST, LAST), draw.randrange(BLOCKS)
    window = 2 if name == "degenerate, one batch of two" else 1
    data = batches(seed, 2 * LAST)
    is_quiet = name == "quiet, then large gradients"
    ckpt_path = base(folder, seed, is_quiet)
    pl.seed_everything(seed, verbose=False)
    module = build(has_batch_loss)
    change: dict[str, Change] = {
        **{name: partial(in_data, other, draw) for name, other in DATA.items()},
        "lr times 10": partial(scale_lr, 10),
        "lr times 30": partial(scale_lr, 30),
        "a block times 8": partial(in_block, block, lambda weight: weight.mul_(8)),
        "a block times -1": partial(in_block, block, lambda weight: weight.mul_(-1)),
        "a corrupted weight": partial(one_weight, block, 3000.0),
        "NaN in a block": partial(one_weight, block, math.nan),
    }
    if is_quiet:
        scale_gradients(module, lambda at: QUIET if at < step else 1.0)
    if name == "large gradients in a block":
        scale_gradients(module.layers.blocks[block], lambda at: 1.0 if at < step else LOUD, module)
    guard = make_guard()
    plant = Plant(guard, step, draw.randrange(window), change.get(name, nothing))
    options = {"max_steps": LAST + WAIT, "accumulate_grad_batches": window}
    trainer = make_trainer(folder, plant, guard, **options)
    trainer.fit(module, DataLoader(data, batch_size=None), ckpt_path=ckpt_path, weights_only=True)
    layer = f"model.{module.layers.block_names[block]}"
    has_layer = PLANTED[name] == "numerics" or name == "large gradients in a block"
    return judge(name, plant, layer if has_layer else None)


class Plain(PretrainModule):
    """As any module that does not know of the guard."""

    batch_loss = None  # type: ignore[assignment]


def judge(name: str, plant: Plant, layer: str | None) -> dict[str, Any]:
    incident = plant.incident
    cause = incident.cause if incident is not None else None
    return {
        "right": cause is not None and cause.kind == PLANTED[name],
        "layer": None if layer is None else (cause is not None and cause.layer == layer),
        "named": "no alarm" if cause is None else cause.label,
        "expected": layer,
        "after": None if incident is None else incident.step - plant.step,
        "false_alarms": plant.false_alarms,
        "text": "" if cause is None else cause.text,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--design", action="store_true", help="take the design seeds")
    parser.add_argument("--foreign", action="store_true", help="take a module without batch_loss")
    parser.add_argument("--only", help="plant only this")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    began = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        results = table(options, folder)
    found = [each for each in results if each["after"] is not None]
    layers = [each["layer"] for each in found if each["layer"] is not None]
    right = sum(each["right"] for each in found)
    print(f"\ncauses named right: {right / len(found):.3f} of {len(found)} incidents (>= 0.85)")
    if layers:
        print(f"layer right: {sum(layers) / len(layers):.3f} of {len(layers)} (>= 0.9)")
    print(f"without an alarm: {len(results) - len(found)}")
    print(f"false alarms before: {sum(each['false_alarms'] for each in results)}")
    print(f"{time.process_time() - began:.0f} s of one core")


def table(options: argparse.Namespace, folder: str) -> list[dict[str, Any]]:
    """A row for each kind of incident."""
    results: list[dict[str, Any]] = []
    print("| planted | incidents | named right | layer right | steps to the alarm | else |")
    print("|---|---:|---:|---:|---|---|")
    for name in [options.only] if options.only else PLANTED:
        runs = [
            run(name, seed, not options.foreign, folder)
            for seed in (DESIGN_SEEDS if options.design else SEEDS)
        ]
        results += runs
        found = [each for each in runs if each["after"] is not None]
        layers = [each["layer"] for each in found if each["layer"] is not None]
        delays = ", ".join(str(each["after"]) for each in found)
        wrong = "; ".join(each["named"] for each in found if not each["right"])
        right, row = sum(each["right"] for each in found), sum(layers) if layers else ""
        print(f"| {name} | {len(found)} | {right} | {row} | {delays} | {wrong} |", flush=True)
        if options.only:
            print(*(f"{each['expected']}: {each}" for each in runs), sep="\n")
    return results


if __name__ == "__main__":
    main()
