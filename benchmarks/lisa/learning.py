"""Learning: full fine-tuning, LISA and LoRA from one novel to the next, three seeds.

    python benchmarks/lisa/learning.py             # half an hour on one core; resumable
    python benchmarks/lisa/learning.py --report    # table and picture of what is finished

The model is the pretrained one of `lightning-align demo`, seed 0, which has read Pride and
Prejudice; it is fine-tuned on Emma, a tenth of whose chapters is held out by each seed. Steps,
batches, warm-up, linear decay, clipping and AdamW are the same on all sides, and so is the loss
code. The learning rate of each side is the best of three on seed 0. LISA draws every 20 steps; LoRA
has rank 16 at every linear layer of the blocks. Memory is the peak of live bytes as in memory.py.
Each run is a process of its own on one thread and leaves a file under benchmarks/cache/lisa; a run
that is there is not run again.
"""

import argparse
import platform
import shutil
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

sys.path.append(str(Path(__file__).parents[2]))  # tests.helpers

from tests.helpers.learning_runs import Curve, keep, kept_run, warmup_and_decay

STEPS, EVERY, SEEDS = 500, 100, (0, 1, 2)
HERE = Path(__file__).parent
CACHE = HERE.parent / "cache/lisa"
NOVEL = HERE.parent / "data/emma.txt.xz"
PICTURE = HERE.parents[1] / "docs/images/lisa.png"
# Side -> learning rates of the sweep
SWEEP = {
    "full": (3e-4, 1e-3, 3e-3),
    "LISA, 1 of 3 blocks": (3e-4, 1e-3, 3e-3),
    "LoRA r16": (3e-3, 1e-2, 3e-2),
}


def base_model() -> Path:
    """The demo's pretrained model; trains it if nobody has."""
    kept = CACHE / "base"
    if not kept.exists():
        demo = HERE.parent / "cache/demo/0"
        if not (demo / "pretrain/model/model.safetensors").exists():
            command = [sys.executable, "-m", "lightning_align", "demo", f"--output={demo}"]
            subprocess.run(command, check=True)
        CACHE.mkdir(parents=True, exist_ok=True)
        temporary = CACHE / "base.tmp"
        shutil.copytree(demo / "pretrain/model", temporary, dirs_exist_ok=True)
        temporary.rename(kept)
    return kept


def build(side: str, lr: float, seed: int, steps: int, interval: int) -> tuple[Any, list[Any]]:
    """The module and LISA, if it takes part."""
    import torch
    from transformers import AutoModelForCausalLM

    from lightning_align import LISA, PretrainModule

    model = AutoModelForCausalLM.from_pretrained(base_model())
    if side.startswith("LoRA"):
        import peft

        config = peft.LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, config).get_base_model()
    module = PretrainModule(
        model,
        optimizer=partial(torch.optim.AdamW, lr=lr, betas=(0.9, 0.95), weight_decay=0.1),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(
            optimizer, warmup_and_decay(steps)
        ),
    )
    if not side.startswith("LISA"):
        return module, []
    lisa = LISA(int(side[6]), interval_steps=interval, seed=seed, filename=None)
    return module, [lisa]


def fit(module: Any, callbacks: list[Any], data: Any, steps: int, **options: Any) -> None:
    import lightning.pytorch as pl

    trainer = pl.Trainer(
        max_steps=steps,
        max_epochs=-1,
        gradient_clip_val=1.0,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=callbacks,
        **options,
    )
    trainer.fit(module, data)


def train(side: str, lr: float, seed: int) -> dict[str, Any]:
    """Validation losses (nats per token), CPU seconds of the steps, and peak of live bytes."""
    import lightning.pytorch as pl
    import torch

    from lightning_align import TextDataModule

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")

    def data() -> TextDataModule:
        return TextDataModule(
            str(NOVEL),
            str(base_model()),
            block_size=128,
            batch_size=4,
            document_pattern="^CHAPTER [IVXL]+$",
            seed=seed,
            cache_dir=CACHE / "tokens",
        )

    pl.seed_everything(seed, verbose=False)
    module, ours = build(side, lr, seed, STEPS, interval=20)
    before = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    (untrained,) = before.validate(module, data(), verbose=False)
    curve = Curve()
    validation = {"val_check_interval": EVERY, "check_val_every_n_epoch": None}
    fit(module, [curve, *ours], data(), STEPS, **validation)

    from memory import Live  # the script beside this one

    live = Live()
    module, ours = build(side, lr, seed, 40, interval=2)
    fit(module, [live, *ours], data(), 40, limit_val_batches=0)
    return {**curve.found, "before": untrained["val_loss"], "peak_bytes": live.peak}


def path_of(side: str, lr: float, seed: int) -> Path:
    return CACHE / f"{side.replace(', ', '-').replace(' ', '_')}-{lr:g}-{seed}-{STEPS}.json"


def result(side: str, lr: float, seed: int, *, run: bool) -> dict[str, Any] | None:
    return kept_run(path_of(side, lr, seed), __file__, side, lr, seed, run=run)


def best_lr(side: str, *, run: bool) -> float | None:
    results = {lr: result(side, lr, 0, run=run) for lr in SWEEP[side]}
    if any(found is None for found in results.values()):
        return None
    return min(results, key=lambda lr: results[lr]["losses"][-1])  # type: ignore[index]


def report(*, run: bool) -> None:
    import lightning
    import torch

    print(f"torch {torch.__version__}, lightning {lightning.__version__}, {platform.machine()}")
    if run:
        for side in SWEEP:
            best_lr(side, run=True)
        for seed in SEEDS:
            for side in SWEEP:
                lr = best_lr(side, run=True)
                assert lr is not None
                result(side, lr, seed, run=True)
    found: dict[str, list[dict[str, Any]]] = {}
    for side in SWEEP:
        sweep = {lr: result(side, lr, 0, run=False) for lr in SWEEP[side]}
        lr = best_lr(side, run=False)
        losses = ", ".join(f"{lr:g}: {r['losses'][-1]:.4f}" for lr, r in sweep.items() if r)
        print(f"{side}: seed 0 {losses}; best {lr}")
        if lr is not None:
            runs = [result(side, lr, seed, run=False) for seed in SEEDS]
            found[side] = [one for one in runs if one]
    if not found:
        return
    before = [one["before"] for one in next(iter(found.values()))]
    print(f"before: {', '.join(f'{loss:.4f}' for loss in before)}\n")
    print(f"| after {STEPS} steps | val loss: median, min, max (seeds) | peak, MiB | CPU s |")
    print("|---|---|---|---|")
    for side, runs in found.items():
        last = [one["losses"][-1] for one in runs]
        figures = f"{median(last):.4f}, {min(last):.4f}, {max(last):.4f} ({len(last)})"
        peak = median(one["peak_bytes"] for one in runs) / 2**20
        spent = median(one["seconds"][-1] for one in runs)
        print(f"| {side} | {figures} | {peak:.1f} | {spent:.0f} |")
    draw(found)


def draw(found: dict[str, list[dict[str, Any]]]) -> None:
    from matplotlib.figure import Figure

    from lightning_align.callbacks.metric_plot import COLOURS

    figure = Figure(figsize=(9, 3.6), dpi=150, layout="constrained")
    curves, memory = figure.subplots(1, 2, sharey=True)
    for colour, (side, runs) in zip(COLOURS, found.items(), strict=False):
        for number, one in enumerate(runs):
            label = side if number == 0 else None
            curves.plot(one["steps"], one["losses"], color=colour, label=label, linewidth=1)
            memory.plot(one["peak_bytes"] / 2**20, one["losses"][-1], "o", color=colour, ms=5)
    curves.set(xlabel="optimizer steps", ylabel="validation loss (nats per token)")
    memory.set(xlabel="peak of live bytes (MiB)", title=f"after {STEPS} steps, each seed")
    curves.legend(frameon=False)
    for axes in (curves, memory):
        axes.grid(color="0.92")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(PICTURE)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--one", nargs=3, metavar=("SIDE", "LR", "SEED"))
    arguments = parser.parse_args()
    if not arguments.one:
        report(run=not arguments.report)
        return
    side, lr, seed = arguments.one
    found = train(side, float(lr), int(seed))
    keep(found, path_of(side, float(lr), int(seed)))


if __name__ == "__main__":
    main()
