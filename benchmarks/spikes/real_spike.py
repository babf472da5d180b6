"""A real spike: degenerate batches in a run, and what each remedy makes of it.

    python benchmarks/spikes/real_spike.py --design   # the setting, on seeds of its own
    python benchmarks/spikes/real_spike.py            # the study, on five others; ten minutes
    python benchmarks/spikes/real_spike.py --report   # tables of what is finished

`markov`: a transformer of 2 blocks and width 64, with the norms behind the residual sums as in the
first one, learns a Markov chain of 64 symbols with AdamW at 0.03 and beta2 0.999; at step 160 of
400 come ten batches of one symbol. It is a LightningModule that knows nothing of this package.
`austen`: a small Llama learns six novels byte by byte with Muon, and gets ten such batches.

All sides of a seed have the same weights, batches, warm-up and decay. Final loss is on held-out
sequences. Excess loss is the area between the held-out losses of a run and of the clean one, where
it is above, from the spike on; steps that a rewind takes again count again.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import SpikeDetection
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader
from transformers import LlamaConfig

sys.path += [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]  # tests.helpers

from runs import Runs, arguments, or_inf, read_novels

from lightning_align import Muon, PretrainModule, SpikeGuard
from lightning_align.optimizers.clipping import ZClip
from tests.helpers.learning_runs import warmup_and_decay

SEEDS, DESIGN_SEEDS = range(5), range(100, 105)
STEPS, SPIKE, EVERY = 400, 160, 4  # optimizer steps; held-out losses from the spike on
SPARE = 200  # batches that a rewind may leave out
SYMBOLS, LENGTH, ROWS = 64, 32, 16
REWIND = {"rewind_steps": 20, "skip_batches": 10, "snapshot_every_n_steps": 20}

# The chain


class Block(nn.Module):
    """Attention and MLP, each followed by the norm of its residual sum, or following one."""

    def __init__(self, width: int, heads: int, is_post_norm: bool) -> None:
        super().__init__()
        self.heads, self.is_post_norm = heads, is_post_norm
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width)
        )
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])

    def attend(self, x_BTD: Tensor) -> Tensor:
        heads = self.qkv(x_BTD).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*heads, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))

    def forward(self, x_BTD: Tensor) -> Tensor:
        for part, norm in zip((self.attend, self.mlp), self.norms, strict=True):
            x_BTD = norm(x_BTD + part(x_BTD)) if self.is_post_norm else x_BTD + part(norm(x_BTD))
        return x_BTD


class ChainModule(pl.LightningModule):
    """Next symbol of a chain; written by hand."""

    def __init__(self, lr: float, is_post_norm: bool) -> None:
        super().__init__()
        width = 64
        self.lr = lr
        self.symbols, self.places = nn.Embedding(SYMBOLS, width), nn.Embedding(LENGTH, width)
        self.blocks = nn.Sequential(*(Block(width, 4, is_post_norm) for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, SYMBOLS, bias=False)

    def loss(self, ids: Tensor) -> Tensor:
        hidden = self.blocks(self.symbols(ids[:, :-1]) + self.places.weight[: ids.shape[1] - 1])
        return F.cross_entropy(self.head(self.norm(hidden)).flatten(0, 1), ids[:, 1:].flatten())

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:  # noqa: ARG002
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(
            self.parameters(), lr=self.lr, betas=(0.9, 0.999), weight_decay=0.01, fused=True
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_and_decay(STEPS))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


def chain_rows(seed: int, count: int) -> Tensor:
    """Rows of LENGTH + 1 symbols, of a chain that the seed draws."""
    generator = torch.Generator().manual_seed(seed)
    transitions = torch.randn(SYMBOLS, SYMBOLS, generator=generator).mul(2).softmax(-1).cumsum(-1)
    rows = [torch.randint(SYMBOLS, (count,), generator=generator)]
    for _ in range(LENGTH):
        draws = torch.rand(count, 1, generator=generator)
        rows.append((transitions[rows[-1]] < draws).sum(-1).clamp(max=SYMBOLS - 1))
    return torch.stack(rows, 1)


# The novels


def novel_rows(seed: int, count: int) -> Tensor:
    """Rows of 64 + 1 bytes, from places that the seed draws."""
    tokens = read_novels()
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(tokens) - 65, (count, 1), generator=generator)
    return tokens[starts + torch.arange(65)]


def llama(lr: float) -> PretrainModule:
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return PretrainModule(
        config,
        optimizer=partial(Muon, lr=lr, adjust_lr_fn="match_rms_adamw"),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(
            optimizer, warmup_and_decay(STEPS)
        ),
    )


def as_batch(ids: Tensor) -> dict[str, Tensor]:
    return {"input_ids": ids, "labels": ids}


# A run


class HeldOut(pl.Callback):
    """Loss on held-out rows every few steps from the spike on, without a trace."""

    def __init__(self, rows: Tensor, loss: Callable[[Tensor], float]) -> None:
        self.rows, self.loss = rows, loss
        self.curve: list[tuple[int, float]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        step = trainer.global_step
        if step >= SPIKE and step % EVERY == 0:
            self.curve.append((step, round(self.loss(self.rows), 5)))


def clip_by_zclip(module: pl.LightningModule) -> None:
    """ZClip as in the paper, at every step."""
    limits = ZClip()

    def clip(*_: Any, **__: Any) -> None:
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        norm = float(nn.utils.get_total_norm(gradients))
        limit = limits.update(norm)
        if limit < norm:
            for gradient in gradients:
                gradient.mul_(limit / norm)

    vars(module)["configure_gradient_clipping"] = clip


# Remedy -> its callbacks. What else differs is in ``train``.
REMEDIES: dict[str, Callable[[], list[Any]]] = {
    "clean": list,
    "unguarded": list,
    "guard, skip": lambda: [SpikeGuard("skip")],
    "guard, rewind": lambda: [SpikeGuard("rewind", **REWIND)],
    "guard, clip": lambda: [SpikeGuard("clip")],
    "guard, skip, clean": lambda: [SpikeGuard("skip")],
    "SpikeDetection": lambda: [SpikeDetection(exclude_batches_path=tempfile.mkdtemp())],
    "clip 1.0": list,
    "ZClip": list,
    "AGC 0.01": lambda: [SpikeGuard("log", agc=0.01)],
}


def train(
    subject: str, remedy: str, seed: int, *, bad: int, lr: float, is_post_norm: bool = True
) -> dict[str, Any]:
    """Final loss, the held-out curve, and what the guard did."""
    torch.manual_seed(seed)
    if subject == "markov":
        module: Any = ChainModule(lr, is_post_norm)
        rows, per_batch = chain_rows(seed, 320 + (STEPS + SPARE) * ROWS), ROWS
        loss_of, as_input = module.loss, lambda ids: ids
    else:
        module = llama(lr)
        rows, per_batch = novel_rows(seed, 320 + (STEPS + SPARE) * 8), 8
        loss_of, as_input = lambda ids: module.batch_loss(as_batch(ids)), as_batch
    final, held_out, rows = rows.split([256, 64, len(rows) - 320])
    batches = list(rows.split(per_batch))
    if bad:
        batches[SPIKE : SPIKE + bad] = [torch.full_like(batches[0], 37)] * bad

    @torch.no_grad()
    def loss(ids: Tensor) -> float:
        return float(loss_of(ids))

    curve = HeldOut(held_out, loss)
    callbacks = REMEDIES[remedy]()
    if remedy == "ZClip":
        clip_by_zclip(module)
    trainer = pl.Trainer(
        max_steps=STEPS,
        gradient_clip_val=1.0 if remedy == "clip 1.0" else None,
        callbacks=[curve, *callbacks],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    stopped = None
    try:
        trainer.fit(module, DataLoader([as_input(ids) for ids in batches], batch_size=None))
    except RuntimeError as error:
        if type(error).__name__ != "TrainingSpikeException":
            raise
        stopped = trainer.global_step
    incidents = [i for c in callbacks if isinstance(c, SpikeGuard) for i in c.report.incidents]
    return {
        "final": round(loss(final), 5),
        "curve": curve.curve,
        "alarms": [[each.step, each.action] for each in incidents],
        "stopped": stopped,
    }


# What is run: a name says all of it

LR, BAD_IN_STUDY = {"markov": 0.03, "austen": 0.02}, 10
STUDY = "{subject}/{bad} bad/{remedy}/{{seed}}"
DESIGN = "design/{subject}/{norm}/lr {lr:g}/bad {bad}/{{seed}}"
DESIGNS = [
    {"subject": subject, "norm": norm, "lr": lr}
    for subject, norm, lr in (
        ("markov", "post-norm", 0.03),
        ("markov", "post-norm", 0.01),
        ("markov", "pre-norm", 0.03),
        ("austen", "pre-norm", 0.02),
        ("austen", "pre-norm", 0.06),
    )
]
BAD = (0, 1, 3, 5, 10)


def run(name: str) -> dict[str, Any]:
    part, *rest = name.split("/")
    if part != "design":
        bad, remedy, seed = rest
        return train(part, remedy, int(seed), bad=int(bad.split()[0]), lr=LR[part])
    subject, norm, lr, bad, seed = rest
    found = train(
        subject,
        "unguarded",
        int(seed),
        bad=int(bad.split()[1]),
        lr=float(lr.split()[1]),
        is_post_norm=norm == "post-norm",
    )
    return {"final": found["final"]}


def pattern_of(subject: str, remedy: str) -> str:
    bad = 0 if remedy.endswith("clean") else BAD_IN_STUDY
    return STUDY.format(subject=subject, bad=bad, remedy=remedy)


def study_names(subject: str) -> list[str]:
    patterns = [pattern_of(subject, remedy) for remedy in REMEDIES]
    return [pattern.format(seed=seed) for pattern in patterns for seed in SEEDS]


def design_names() -> list[str]:
    patterns = [DESIGN.format(**each, bad=bad) for each in DESIGNS for bad in BAD]
    return [pattern.format(seed=seed) for pattern in patterns for seed in DESIGN_SEEDS]


# Tables


def excess(run: dict[str, Any], clean: dict[str, Any]) -> float:
    """Nats times steps above the clean curve."""
    usual = dict(clean["curve"])
    return EVERY * sum(max(0.0, or_inf(loss) - usual[step]) for step, loss in run["curve"])


def recovery(run: dict[str, Any], clean: dict[str, Any]) -> float:
    """Steps from the spike until the loss is, and stays, within 2 % of the clean run's."""
    usual = dict(clean["curve"])
    above = [step for step, loss in run["curve"] if or_inf(loss) > 1.02 * usual[step]]
    if not above:
        return 0
    return float("inf") if above[-1] >= STEPS - EVERY else above[-1] + EVERY - SPIKE


def report_design(runs: Runs) -> None:
    print("\n| final loss over the clean run's, median [min, max] of the design seeds |", end="")
    print("".join(f" {bad} bad |" for bad in BAD[1:]))
    print("|---|" + "---:|" * (len(BAD) - 1))
    for each in DESIGNS:
        clean = runs.named(DESIGN.format(**each, bad=0), DESIGN_SEEDS)
        cells = []
        for bad in BAD[1:]:
            found = runs.named(DESIGN.format(**each, bad=bad), DESIGN_SEEDS)
            ratios = [a["final"] / b["final"] for a, b in zip(found, clean, strict=False)]
            cells.append(spread(ratios) if len(ratios) == len(DESIGN_SEEDS) else "")
        print(f"| {each['subject']}, {each['norm']}, lr {each['lr']:g} | {' | '.join(cells)} |")


def spread(values: list[float], digits: int = 3) -> str:
    numbers = [or_inf(value) for value in values]
    low, middle, high = (f"{f(numbers):.{digits}f}" for f in (min, median, max))
    return f"{middle} [{low}, {high}]"


def report_study(runs: Runs, subject: str) -> None:
    print(f"\n| {subject}: median [min, max] of seeds | final loss / clean | excess loss", end="")
    print(" / unguarded's | steps to recover | alarms |\n|---|---:|---:|---:|---:|")
    for remedy in REMEDIES:
        rows = []
        for seed in SEEDS:
            sides = (remedy, "clean", "unguarded")
            names = [pattern_of(subject, each).format(seed=seed) for each in sides]
            if all(name in runs.found for name in names):
                rows.append([runs.found[name] for name in names])
        if not rows or remedy == "clean":
            continue
        final = spread([run["final"] / clean["final"] for run, clean, _ in rows])
        area = spread([excess(a, clean) / excess(b, clean) for a, clean, b in rows])
        steps = spread([recovery(run, clean) for run, clean, _ in rows], 0)
        stops = [run["stopped"] for run, *_ in rows if run["stopped"] is not None]
        if stops:
            final, area, steps = f"{final} when it stops", "", f"stops at {spread(stops, 0)}"
        alarms = spread([len(run["alarms"]) for run, *_ in rows], 0)
        guarded = alarms if remedy.startswith(("guard", "AGC")) else ""
        print(f"| {remedy} ({len(rows)}) | {final} | {area} | {steps} | {guarded} |")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--design", action="store_true", help="settings, on the design seeds")
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    print(f"torch {torch.__version__}, lightning {pl.__version__}")
    runs = Runs(given.runs / "real_spike.jsonl")
    if given.design:
        runs.finish(design_names(), run, given.limit)
        report_design(runs)
        return
    for subject in LR:
        runs.finish(study_names(subject), run, given.limit)
        report_study(runs, subject)


if __name__ == "__main__":
    main()
