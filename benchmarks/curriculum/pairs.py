"""DPO on the demo's pairs: easy first, in an order of chance, hard first, all at once.

    python benchmarks/curriculum/pairs.py             # 12 runs of half a minute; resumable
    python benchmarks/curriculum/pairs.py --report    # tables of what is finished

Each seed has a demo of its own (benchmarks/demo_seeds.py, about four minutes if it has not run):
held-out chapters, pretrained model, 1024 pairs to learn from and 256 of chapters that no stage saw.
A pair is as hard as the pretrained model, the reference, finds the rejected completion likelier
than the chosen one (Curri-DPO, arXiv:2403.07230). Easy first begins with the easiest fifth, and the
others join by and by during the first half of the training. The order of chance has the same pacing
over the same difficulties, dealt out anew; hard first, over their negatives. All at once is DPO
without a curriculum. What a curriculum is worth is the difference to the order of chance.

Otherwise as in the demo: 128 steps of 16 pairs, AdamW at 2e-4, beta 0.5.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch.utils.data import DataLoader

sys.path.append(str(Path(__file__).parents[1]))

from demo_seeds import CACHE as DEMOS
from demo_seeds import report_of
from runs import Runs, arguments, given_to

from lightning_align import DPOModule, PreferenceDataModule
from lightning_align.cli.difficulty import OneByOne
from lightning_align.data import CurriculumSampler, DifficultyAnalyzer, PositionSampler
from lightning_align.losses.difficulty import ReferenceMargin
from lightning_align.models.build import build_model

CACHE = Path(__file__).parents[1] / "cache/curriculum"
SEEDS = range(3)
ARMS = ("all at once", "easy first", "order of chance", "hard first")
STEPS, PAIRS, EVERY = 128, 16, 32  # steps of a run, pairs of a step, steps between validations
PACING = {
    "min_difficulty": 20,  # per cent of the pairs
    "max_difficulty": 100,
    "schedule_type": "fixed_linear",
    "schedule_config": {"total_curriculum_step": STEPS // 2, "difficulty_step": 1},
}


def data_of(seed: int) -> PreferenceDataModule:
    """The pairs of the demo of a seed."""
    report_of(seed)
    folder = DEMOS / str(seed)
    data = PreferenceDataModule(
        str(folder / "pairs/train.jsonl"),
        str(folder / "pretrain/model"),
        val_paths=str(folder / "pairs/val.jsonl"),
        batch_size=PAIRS,
        max_length=128,
        append_eos=False,
        seed=seed,
    )
    data.prepare_data()
    data.setup("fit")
    return data


def margins(seed: int, data: PreferenceDataModule) -> Any:
    """How hard each pair is to the reference, (N,)."""
    model: Any = build_model(str(DEMOS / str(seed) / "pretrain/model"), where="pairs")
    analyzer = DifficultyAnalyzer(
        OneByOne(data.train_dataset),
        {"margin": ReferenceMargin(model.eval(), f"demo {seed}")},
        CACHE / f"margins/{seed}",
        fingerprint=data.fingerprint,
    )
    analyzer.map()
    return analyzer.reduce()["margin"].values


def sampler_of(arm: str, seed: int, data: PreferenceDataModule) -> PositionSampler:
    assert data.train_dataset is not None
    if arm == "all at once":
        return PositionSampler(len(data.train_dataset), PAIRS, seed=seed)
    difficulties = np.array(margins(seed, data))
    if arm == "order of chance":
        difficulties = np.random.default_rng(seed).permutation(difficulties)
    elif arm == "hard first":
        difficulties = -difficulties
    return CurriculumSampler(difficulties, PACING, PAIRS, seed=seed, difficulty_type="percentile")


class Curve(pl.Callback):
    """Held-out accuracy and loss at each validation."""

    def __init__(self) -> None:
        self.accuracies: list[float] = []
        self.losses: list[float] = []

    def on_validation_end(self, trainer: pl.Trainer, _: pl.LightningModule) -> None:
        self.accuracies.append(round(float(trainer.callback_metrics["val_rewards/accuracies"]), 4))
        self.losses.append(round(float(trainer.callback_metrics["val_loss"]), 4))


def run(name: str) -> dict[str, Any]:
    arm, number = name.split("/")
    seed = int(number)
    data = data_of(seed)
    sampler, curve = sampler_of(arm, seed, data), Curve()
    pl.seed_everything(seed, verbose=False)
    optimizer = partial(torch.optim.AdamW, lr=2e-4, betas=(0.9, 0.95), weight_decay=0.0)
    model = str(DEMOS / number / "pretrain/model")
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=STEPS,
        gradient_clip_val=1.0,
        val_check_interval=EVERY,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        callbacks=[curve],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    loader = DataLoader(data.train_dataset, sampler=sampler, batch_size=None)  # type: ignore
    trainer.fit(DPOModule(model, beta=0.5, optimizer=optimizer), loader, data.val_dataloader())
    return {"accuracies": curve.accuracies, "losses": curve.losses}


def report(runs: Runs) -> None:
    steps = [f"step {step}" for step in range(EVERY, STEPS + 1, EVERY)]
    for title, key in (("held-out accuracy", "accuracies"), ("held-out loss", "losses")):
        print(
            f"\n| {title} | {' | '.join(steps)} | at the end, by seed | less the order of chance |"
        )
        print("|---|" + "---:|" * len(steps) + "---|---|")
        for arm in ARMS:
            found = [each[key] for each in runs.named(f"{arm}/{{seed}}", SEEDS)]
            control = [each[key] for each in runs.named("order of chance/{seed}", SEEDS)]
            if len(found) < len(SEEDS) or len(control) < len(SEEDS):
                continue
            curve = [f"{median(values):.3f}" for values in zip(*found, strict=True)]
            ends = [f"{each[-1]:.3f}" for each in found]
            gains = [f"{a[-1] - b[-1]:+.3f}" for a, b in zip(found, control, strict=True)]
            print(f"| {arm} | {' | '.join(curve)} | {', '.join(ends)} | {', '.join(gains)} |")


def main() -> None:
    given = given_to(arguments(__doc__), CACHE)
    runs = Runs(given.runs / "pairs.jsonl")
    runs.finish([f"{arm}/{seed}" for seed in SEEDS for arm in ARMS], run, given.limit)
    report(runs)


if __name__ == "__main__":
    main()
