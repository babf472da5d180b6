"""Learning: the demo's Llama on the novel with AdamW, Muon, GaLore and galore-torch, three seeds.

    python benchmarks/optimizers/learning.py             # about an hour on one core; resumable
    python benchmarks/optimizers/learning.py --report    # table and picture of what is finished

Model, data, batch, clipping and number of steps are those of `lightning-align demo`; every
optimizer has the same warm-up (5 %) and linear decay. The learning rate of each comes from a sweep
over factors of two (seed 0, a fifth of the steps); the best one is trained on three seeds. Each run
is a process of its own on one thread and leaves a file under benchmarks/cache/learning; a run that
is there is not run again. Time is CPU time of training steps, without validation.
"""

import argparse
import platform
import sys
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

sys.path.append(str(Path(__file__).parents[2]))  # tests.helpers

from tests.helpers.learning_runs import Curve, keep, kept_run, warmup_and_decay

STEPS, SWEEP_STEPS = 2500, 500
SEEDS = (0, 1, 2)
EVERY = 250  # steps between validations
RANK, GAP = 40, 100  # a quarter of the width, as in GaLore's table 2
CACHE = Path(__file__).parents[1] / "cache/learning"
PICTURE = Path(__file__).parents[2] / "docs/images/optimizers.png"
# Name -> learning rates of the sweep. Muon's update has AdamW's size (match_rms_adamw).
SWEEP = {
    "AdamW": (6e-4, 1.25e-3, 2.5e-3, 5e-3, 1e-2),
    "Muon": (5e-3, 1e-2, 2e-2),
    "galore-torch": (5e-3, 1e-2, 2e-2, 4e-2),
    "GaLoreAdamW": (5e-3, 1e-2, 2e-2, 4e-2),
}


def build_optimizer(name: str, lr: float, groups: list[dict[str, Any]]) -> Any:
    import torch

    if name == "AdamW":
        return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    if name == "Muon":
        from lightning_align import Muon

        return Muon(groups, lr=lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    if name == "GaLoreAdamW":
        from lightning_align import GaLoreAdamW

        return GaLoreAdamW(groups, lr=lr, betas=(0.9, 0.95), rank=RANK, update_proj_gap=GAP)
    from galore_torch import GaLoreAdamW as GaLoreTorch

    projection = {"rank": RANK, "update_proj_gap": GAP, "scale": 0.25, "proj_type": "std"}
    theirs = [
        {"params": [p for _, p in group["params"]], **(projection if group["use_muon"] else {})}
        for group in groups
    ]
    return GaLoreTorch(theirs, lr=lr, betas=(0.9, 0.95), no_deprecation_warning=True)


def train(name: str, lr: float, seed: int, steps: int) -> dict[str, Any]:
    """Validation loss (nats per token) and CPU seconds of training, every ``EVERY`` steps."""
    import lightning.pytorch as pl
    import torch
    from transformers import LlamaConfig

    from lightning_align import PretrainModule, TextDataModule

    torch.set_num_threads(1)
    pl.seed_everything(seed, verbose=False)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=160,
        intermediate_size=432,
        num_hidden_layers=3,
        num_attention_heads=5,
        num_key_value_heads=5,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    module = PretrainModule(
        config,
        optimizer=partial(build_optimizer, name, lr),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(
            optimizer, warmup_and_decay(steps)
        ),
    )
    data = TextDataModule(vocab_size=1024, block_size=128, batch_size=4, seed=seed)
    curve = Curve()
    trainer = pl.Trainer(
        max_steps=steps,
        val_check_interval=EVERY,
        check_val_every_n_epoch=None,
        gradient_clip_val=1.0,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[curve],
    )
    trainer.fit(module, data)
    return curve.found


def path_of(name: str, lr: float, seed: int, steps: int) -> Path:
    return CACHE / f"{name}-{lr:g}-{seed}-{steps}.json"


def result(name: str, lr: float, seed: int, steps: int, *, run: bool) -> dict[str, Any] | None:
    path = path_of(name, lr, seed, steps)
    return kept_run(path, __file__, name, lr, seed, steps, run=run)


def best_lr(name: str, *, run: bool) -> float | None:
    results = {lr: result(name, lr, 0, SWEEP_STEPS, run=run) for lr in SWEEP[name]}
    if any(found is None for found in results.values()):
        return None
    return min(results, key=lambda lr: results[lr]["losses"][-1])  # type: ignore[index]


def report(*, run: bool) -> None:
    import lightning
    import torch

    print(f"torch {torch.__version__}, lightning {lightning.__version__}, {platform.machine()}")
    if run:  # seed by seed: what is finished early can already be compared
        for name in SWEEP:
            best_lr(name, run=True)
        for seed in SEEDS:
            for name in SWEEP:
                lr = best_lr(name, run=True)
                assert lr is not None
                result(name, lr, seed, STEPS, run=True)
    curves: dict[str, list[dict[str, Any]]] = {}
    for name in SWEEP:
        sweep = {lr: result(name, lr, 0, SWEEP_STEPS, run=False) for lr in SWEEP[name]}
        lr = best_lr(name, run=False)
        losses = ", ".join(f"{lr:g}: {r['losses'][-1]:.4f}" for lr, r in sweep.items() if r)
        print(f"{name}: sweep of {SWEEP_STEPS} steps {losses}; best {lr}")
        if lr is not None:
            found = [result(name, lr, seed, STEPS, run=False) for seed in SEEDS]
            curves[name] = [curve for curve in found if curve]
    print(f"\n| after {STEPS} steps, {len(SEEDS)} seeds | val loss: median, min, max | CPU s |")
    print("|---|---|---|")
    for name, runs in curves.items():
        if runs:
            last = [curve["losses"][-1] for curve in runs]
            spent = mean(curve["seconds"][-1] for curve in runs)
            figures = f"{median(last):.4f}, {min(last):.4f}, {max(last):.4f}"
            print(f"| {name} | {figures} ({len(runs)}) | {spent:.0f} |")
    draw(curves)


def draw(curves: dict[str, list[dict[str, Any]]]) -> None:
    from matplotlib.figure import Figure

    from lightning_align.callbacks.metric_plot import COLOURS

    figure = Figure(figsize=(9, 3.6), dpi=150, layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for colour, (name, runs) in zip(COLOURS, curves.items(), strict=False):
        for number, curve in enumerate(runs):
            label = name if number == 0 else None
            for axis, x in zip(axes, (curve["steps"], curve["seconds"]), strict=True):
                axis.plot(x, curve["losses"], color=colour, label=label, linewidth=1)
    axes[0].set(xlabel="optimizer steps", ylabel="validation loss (nats per token)", ylim=(None, 5))
    axes[1].set(xlabel="CPU time of the steps (s)")
    axes[0].legend(frameon=False)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(PICTURE)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--one", nargs=4, metavar=("NAME", "LR", "SEED", "STEPS"))
    arguments = parser.parse_args()
    if not arguments.one:
        report(run=not arguments.report)
        return
    name, lr, seed, steps = arguments.one
    found = train(name, float(lr), int(seed), int(steps))
    keep(found, path_of(name, float(lr), int(seed), int(steps)))


if __name__ == "__main__":
    main()
