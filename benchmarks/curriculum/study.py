"""What a curriculum is worth: the baseline is tuned first, then every arm with as many runs.

    python benchmarks/curriculum/study.py --limit 8    # eight runs of about a minute; resumable
    python benchmarks/curriculum/study.py --report     # tables of what is finished
    python benchmarks/curriculum/study.py --report --plot docs/images/curriculum_study.png

A Llama of 3 blocks and width 128 learns six novels, of which chapters are held out, in blocks of
256 tokens; documents are chapters and do not see each other. Learning rate and end of a run follow
the tokens that are learned from, for every arm the same.

1. The baseline, blocks in an order of chance at their whole length, is swept over rows of a batch
   and learning rate on seed 0, and the sweep widened until neither best value lies at an end.
2. Every arm is run with the same rows at LADDER times the baseline's learning rate on seed 0.
3. The best learning rate of each is run on seeds 1 to 3, which had no part in any choice.

Arms: rows that grow (truncate, reshape, bucket, and reshape when the loss has flattened), batches
that grow to GROWTH times the rows, order by the words of a sentence (blocks are of one length), by
rarity, by loss under a reference that has learned a quarter of the tokens (what it costs to train
and to ask it is the arm's), reshape with the best of these orders, and as controls that order
turned round and dealt out anew, with the same pacing.
Lengths grow over the first LENGTH_SHARE of the tokens, orders over the first ORDER_SHARE of the
batches.

The loss is that of whole blocks of held-out chapters. CPU time is the training's alone, without
what measures it; ratios are of the time and of the tokens until the baseline's final loss on the
same seed, whose whole run is 1.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from transformers import LlamaConfig

sys.path.append(str(Path(__file__).parents[1]))

from runs import NOVELS, Runs, arguments, given_to

from lightning_align import (
    Curriculum,
    PretrainModule,
    TextDataModule,
    TokenSchedule,
)
from lightning_align.callbacks.metric_plot import COLOURS
from lightning_align.cli.difficulty import OneByOne
from lightning_align.data import DifficultyAnalyzer
from lightning_align.data.difficulty_metrics import VocabularyRarity, count_tokens, tokens_of
from lightning_align.losses.difficulty import ReferenceLoss
from lightning_align.models.build import build_model

CACHE = Path(__file__).parents[1] / "cache/curriculum"
SEED, SEEDS = 0, (1, 2, 3)
BLOCK = 256  # tokens
LENGTHS = (32, 64, 128, 256)  # each divides the next: reshaping loses nothing
ROWS, RATES = (2, 4, 8), (1.25e-3, 2.5e-3, 5e-3)  # where the sweep begins
LADDER = (0.25, 0.5, 1.0, 2.0)  # of the baseline's learning rate
LENGTH_SHARE, ORDER_SHARE = 0.4, 0.5
GROWTH = 4  # rows of the largest batch over those of the first
REFERENCE_SHARE = 0.25  # of the tokens
ORDERS = ("sentences", "rarity", "loss")
MARKS, SOME = 16, 48  # measurements of a run, blocks of each


class Setting(NamedTuple):
    """All that decides a run: its name says it."""

    arm: str
    rows: int
    lr: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.arm}/rows {self.rows}/lr {self.lr:g}/{self.seed}"

    @classmethod
    def read(cls, name: str) -> Setting:
        arm, rows, lr, seed = name.split("/")
        return cls(arm, int(rows.split()[1]), float(lr.split()[1]), int(seed))


# Arms


def linear(least: int, greatest: int, step: int, **total: int) -> dict[str, Any]:
    config = {"difficulty_step": step, **total}
    pacing = {"schedule_type": "fixed_linear", "schedule_config": config}
    return {"min_difficulty": least, "max_difficulty": greatest, **pacing}


def in_steps(kind: str, **config: Any) -> dict[str, Any]:
    """A schedule of LENGTHS."""
    levels = {"difficulty": list(LENGTHS), **config}
    ends = {"min_difficulty": LENGTHS[0], "max_difficulty": LENGTHS[-1]}
    return {**ends, "schedule_type": kind, "schedule_config": levels}


def curriculum_of(setting: Setting, tokens: int) -> tuple[dict[str, Any], float]:
    """Arguments of ``Curriculum``, and the CPU seconds that it took to know them."""
    arm, rows = setting.arm, setting.rows
    end = int(LENGTH_SHARE * tokens)
    last = [end * (i + 1) // (len(LENGTHS) - 1) for i in range(len(LENGTHS) - 1)]
    length = {"scheduler": in_steps("fixed_discrete", max_tokens=last)}
    if arm in ("truncate", "reshape", "bucket"):
        return {"length": {"mode": arm, **length}}, 0.0
    if arm == "self-paced":
        paced = in_steps("self_paced", window=25, lag=16)  # batches
        return {"length": {"mode": "reshape", "scheduler": paced}}, 0.0
    if arm == "batch":
        grown = linear(rows, GROWTH * rows, 1, total_curriculum_tokens=end)
        return {"batch_size": {"scheduler": grown}}, 0.0
    if arm == "baseline":
        return {}, 0.0
    kind, _, metric = arm.rpartition(" ")
    values, seconds = difficulties(metric, setting, tokens)
    if kind.endswith("hard first"):
        values = -values
    elif kind.endswith("chance"):
        values = np.random.default_rng(setting.seed).permutation(values)
    steps = int(ORDER_SHARE * tokens / BLOCK / rows)
    order = {
        "difficulties": values.tolist(),
        "difficulty_type": "percentile",
        "scheduler": linear(20, 100, 1, total_curriculum_step=steps),
    }
    if kind == "reshape and":
        return {"order": order, "length": {"mode": "reshape", **length}}, seconds
    return {"order": order}, seconds


class SentenceLength:
    """Mean number of words of the sentences of a sample."""

    key = "words of a sentence"

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self.decode = decode

    def __call__(self, sample: Any) -> float:
        sentences = re.split(r"[.!?;]+", self.decode(tokens_of(sample).tolist()))
        return fmean(len(sentence.split()) for sentence in sentences)


def difficulties(metric: str, setting: Setting, tokens: int) -> tuple[Any, float]:
    """Of each training block, and the CPU seconds that they cost."""
    folder = CACHE / f"study_{tokens}/{setting.seed}"
    cost = folder / f"{metric}.json"
    data = text(setting.seed, setting.rows)
    samples = OneByOne(data.train_dataset)
    start, seconds = time.process_time(), 0.0
    if metric == "loss":
        model, seconds = reference(setting, tokens, folder / "reference")
        made: Any = ReferenceLoss(model.eval(), f"reference {setting.seed}")
        start = time.process_time()  # what measured the reference while it learned is no cost
    elif metric == "rarity":
        made = VocabularyRarity(count_tokens(map(samples.__getitem__, range(len(samples)))))
    else:
        made = SentenceLength(data.tokenizer.decode)
    analyzer = DifficultyAnalyzer(samples, {metric: made}, folder, fingerprint=data.fingerprint)
    computed = analyzer.map().computed
    values = np.array(analyzer.reduce()[metric].values)
    if computed or not cost.exists():
        cost.write_text(json.dumps(seconds + time.process_time() - start))
    return values, json.loads(cost.read_text())


def reference(setting: Setting, tokens: int, folder: Path) -> tuple[Any, float]:
    """A model that has learned a part of the tokens, and the CPU seconds of that."""
    cost = folder / "cpu_s.json"
    if not cost.exists():
        part = int(REFERENCE_SHARE * tokens)
        module, curve = train(setting._replace(arm="baseline"), part)
        module.model.save_pretrained(folder)  # type: ignore[operator]
        cost.write_text(json.dumps(curve.points[-1][1]))
    return build_model(str(folder), where="study"), json.loads(cost.read_text())


# A run


def text(seed: int, rows: int) -> TextDataModule:
    data = TextDataModule(
        str(NOVELS / "*.txt.xz"),
        vocab_size=1024,
        block_size=BLOCK,
        batch_size=rows,
        val_fraction=0.1,
        document_pattern=r"^(CHAPTER|Chapter) ",
        separate_documents=True,
        seed=seed,
        cache_dir=CACHE / "tokens",
    )
    data.prepare_data()
    data.setup("fit")
    return data


class Curve(pl.Callback):
    """Loss on held-out blocks at MARKS places of a run.

    Attributes:
        points: Tokens learned from, CPU seconds of training, loss.
    """

    def __init__(self, data: TextDataModule, schedule: TokenSchedule, tokens: int) -> None:
        self.data, self.schedule, self.tokens = data, schedule, tokens
        self.points: list[tuple[int, float, float]] = []
        self.measuring = 0.0

    def on_train_start(self, *_: Any) -> None:
        self.begin = time.process_time()

    def on_train_batch_end(self, _: pl.Trainer, module: pl.LightningModule, *__: Any) -> None:
        seen = self.schedule.tokens_seen
        if seen >= self.tokens * (len(self.points) + 1) / MARKS:
            start = time.process_time()
            loss = held_out_loss(module, self.data, SOME)
            self.points.append((seen, round(start - self.begin - self.measuring, 2), loss))
            self.measuring += time.process_time() - start


@torch.no_grad()
def held_out_loss(module: Any, data: TextDataModule, blocks: int) -> float:
    """Mean loss of the first held-out blocks."""
    assert data.val_dataset is not None
    numbers = range(min(blocks, len(data.val_dataset)))
    module.eval()
    losses: list[Tensor] = []
    for first in range(0, len(numbers), 8):
        batch = data.val_dataset[list(numbers[first : first + 8])]
        losses.append(module.predict_step(batch, 0))
    module.train()
    return round(float(torch.cat(losses).mean()), 4)


def adamw(lr: float) -> Any:
    return partial(torch.optim.AdamW, lr=lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)


def module_of(setting: Setting, optimizer: Any, **sizes: int) -> PretrainModule:
    """The model of a run; ``sizes`` in place of the study's."""
    pl.seed_everything(setting.seed, verbose=False)
    config = LlamaConfig(
        **{"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 3, **sizes},
        vocab_size=1024,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=BLOCK,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    return PretrainModule(config, optimizer=optimizer)


def schedule_of(tokens: int) -> TokenSchedule:
    return TokenSchedule(tokens, "cosine", warmup_tokens=tokens // 20)


def fit(
    module: PretrainModule, data: TextDataModule, callbacks: list[pl.Callback], clip: float | None
) -> None:
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=-1,
        gradient_clip_val=clip,
        limit_val_batches=0,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, datamodule=data)


def train(setting: Setting, tokens: int, **curriculum: Any) -> tuple[PretrainModule, Curve]:
    rows = setting.rows * (GROWTH if setting.arm == "batch" else 1)  # of the largest batch
    data, module = text(setting.seed, rows), module_of(setting, adamw(setting.lr))
    schedule = schedule_of(tokens)
    curve = Curve(data, schedule, tokens)
    extra = [Curriculum(**curriculum, preflight=False, filename=None)] if curriculum else []
    fit(module, data, [schedule, curve, *extra], clip=1.0)
    return module, curve


def run(tokens: int, name: str) -> dict[str, Any]:
    setting = Setting.read(name)
    curriculum, seconds = curriculum_of(setting, tokens)
    module, curve = train(setting, tokens, **curriculum)
    final = held_out_loss(module, curve.data, sys.maxsize)
    return {"final": final, "points": curve.points, "index_s": round(seconds, 2)}


# What is run


class Study:
    """Which runs are due, from those that are finished.

    Args:
        runs: Finished ones.
        tokens: That each run learns from.
        limit: Runs to do at most; None does all.
    """

    def __init__(self, runs: Runs, tokens: int, limit: int | None) -> None:
        self.runs, self.tokens, self.left = runs, tokens, limit

    def finish(self, settings: list[Setting]) -> bool:
        """Run what is missing; whether all are finished."""
        names = [setting.name for setting in settings]
        done = self.runs.finish(names, partial(run, self.tokens), self.left)
        if self.left is not None:
            self.left -= done
        return all(name in self.runs.found for name in names)

    def final(self, setting: Setting) -> float:
        """Its loss; infinite if it is none."""
        loss = self.runs.found[setting.name]["final"]
        return loss if loss == loss else float("inf")

    def best(self, settings: list[Setting]) -> Setting:
        return min(settings, key=self.final)

    def sweep(self) -> Setting | None:
        """The baseline's best setting, once neither of its values lies at an end."""
        tried = [Setting("baseline", rows, lr, SEED) for rows in ROWS for lr in RATES]
        while self.finish(tried):
            best = self.best(tried)
            rates = sorted(each.lr for each in tried if each.rows == best.rows)
            rows = sorted({each.rows for each in tried})
            more: list[Setting] = []
            if best.lr in (rates[0], rates[-1]):
                more = [best._replace(lr=best.lr * (2 if best.lr == rates[-1] else 0.5))]
            elif best.rows == rows[-1] or (best.rows == rows[0] and best.rows > 1):
                other = best.rows * 2 if best.rows == rows[-1] else best.rows // 2
                more = [best._replace(rows=other, lr=lr) for lr in rates]
            if not more:
                return best
            tried += more
        return None

    def ladder(self, arm: str, base: Setting) -> list[Setting]:
        return [base._replace(arm=arm, lr=base.lr * factor) for factor in LADDER]

    def tuned(self, arm: str, base: Setting) -> Setting | None:
        """The best of an arm on seed 0; None while runs are missing."""
        ladder = self.ladder(arm, base)
        return self.best(ladder) if self.finish(ladder) else None

    def arms(self, base: Setting) -> list[str]:
        """All arms; those of the best order once it is known."""
        arms = ["baseline", "reshape", "truncate", "bucket", "batch", "self-paced"]
        orders = [f"by {metric}" for metric in ORDERS]
        tuned = {arm: setting for arm in orders if (setting := self.tuned(arm, base))}
        if len(tuned) == len(orders):
            best = min(tuned, key=lambda arm: self.final(tuned[arm])).split()[1]
            orders += [f"{kind} {best}" for kind in ("reshape and", "hard first", "chance")]
        return arms + orders

    def go_on(self) -> tuple[Setting | None, dict[str, Setting]]:
        """Run what is due; the baseline's best setting, and that of each arm that is tuned."""
        base = self.sweep()
        if base is None:
            return None, {}
        tuned = {arm: best for arm in self.arms(base) if (best := self.tuned(arm, base))}
        for best in tuned.values():
            self.finish([best._replace(seed=seed) for seed in SEEDS])
        return base, tuned


# Tables


def needed(loss: float, found: dict[str, Any]) -> tuple[float, float]:
    """Tokens and CPU seconds until a run had that loss, between its measurements in proportion."""
    before = (0.0, 0.0, float("inf"))
    for tokens, seconds, now in found["points"]:
        if now <= loss:
            share = 1.0 if before[2] == float("inf") else (before[2] - loss) / (before[2] - now)
            at = [a + share * (b - a) for a, b in zip(before, (tokens, seconds), strict=False)]
            return at[0], found["index_s"] + at[1]
        before = (tokens, seconds, now)
    return float("inf"), float("inf")


def spread(values: list[float], digits: int = 3) -> str:
    low, middle, high = (f"{f(values):.{digits}f}" for f in (min, median, max))
    return f"{middle} [{low}, {high}]"


def on_seeds(study: Study, tuned: dict[str, Setting], arm: str) -> list[dict[str, Any]]:
    """The runs of a tuned arm on SEEDS; none if they are not all finished."""
    if arm not in tuned:
        return []
    found = study.runs.named(tuned[arm]._replace(seed=-1).name.replace("/-1", "/{seed}"), SEEDS)
    return found if len(found) == len(SEEDS) else []


def report(study: Study, base: Setting | None, tuned: dict[str, Setting]) -> None:
    swept = sorted(map(Setting.read, study.runs.found))
    swept = [each for each in swept if each.arm == "baseline" and each.seed == SEED]
    rates = sorted({each.lr for each in swept})
    print("\n| baseline, seed 0 | " + " | ".join(f"{lr:g}" for lr in rates) + " |")
    print("|---|" + "---:|" * len(rates))
    for rows in sorted({each.rows for each in swept}):
        cells = {each.lr: f"{study.final(each):.3f}" for each in swept if each.rows == rows}
        print(f"| {rows} rows | " + " | ".join(cells.get(lr, "") for lr in rates) + " |")
    if base is None:
        return
    columns = ["lr", "at an end", "loss on seed 0", "loss, seeds 1 to 3", "CPU, s", "CPU ratio"]
    print(f"\n| arm | {' | '.join(columns)} | tokens |")
    print("|---|---:|---|---:|---|---|---|---|")
    for arm, best in tuned.items():
        end = "yes" if best.lr in (base.lr * LADDER[0], base.lr * LADDER[-1]) else ""
        row = f"| {arm} | {best.lr:g} | {end} | {study.final(best):.3f} |"
        found, others = (on_seeds(study, tuned, each) for each in (arm, "baseline"))
        if found and others:
            pairs = list(zip(found, others, strict=True))
            reached = [needed(other["points"][-1][2], each) for each, other in pairs]
            of_tokens, of_time = (
                [
                    got[i] / other["points"][-1][i]
                    for got, other in zip(reached, others, strict=True)
                ]
                for i in (0, 1)
            )
            cpu = [each["points"][-1][1] + each["index_s"] for each in found]
            losses = spread([each["final"] for each in found])
            row += f" {losses} | {spread(cpu, 0)} | {spread(of_time, 2)} | {spread(of_tokens, 2)} |"
        print(row)


def draw(study: Study, tuned: dict[str, Setting], path: Path) -> None:
    """Loss at full length against CPU time: in each panel some arms beside the baseline."""
    plain = on_seeds(study, tuned, "baseline")
    of_order = [arm for arm in tuned if " " in arm and not arm.startswith("reshape")]
    panels = {
        "rows and batches that grow": [a for a in tuned if a not in of_order and a != "baseline"],
        "order, and its controls": of_order,
    }
    figure = Figure(figsize=(9, 3.6), dpi=150, layout="constrained")
    for axes, (title, arms) in zip(figure.subplots(1, 2, sharey=True), panels.items(), strict=True):
        shown = {"baseline": plain, **{arm: on_seeds(study, tuned, arm) for arm in arms}}
        shown = {arm: found for arm, found in shown.items() if found}
        # The baseline is black and in front; others, as many as there are colours.
        for (arm, found), colour in zip(shown.items(), ["black", *COLOURS], strict=False):
            marks = zip(*(each["points"] for each in found), strict=False)  # of all seeds at a time
            middle = [[median(values) for values in zip(*at, strict=True)] for at in marks]
            index_s = median(each["index_s"] for each in found)
            seconds, losses = [s + index_s for _, s, _ in middle], [loss for *_, loss in middle]
            front = {"zorder": 3, "linewidth": 1.6} if arm == "baseline" else {"linewidth": 1.1}
            axes.plot(seconds, losses, color=colour, label=arm, **front)
        axes.set(title=title, xlabel="CPU time (s)", xlim=(0, None))
        axes.legend(frameon=False, fontsize=8)
        axes.grid(color="0.92")
        axes.spines[["top", "right"]].set_visible(False)
        if plain:
            axes.axhline(median(f["points"][-1][2] for f in plain), color="0.6", lw=0.8, ls=":")
    figure.axes[0].set_ylabel("held-out loss of whole blocks")
    figure.savefig(path)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--plot", type=Path, help="PNG to draw of what is finished")
    parser.add_argument("--tokens", type=int, default=600_000, help="that a run learns from")
    given = given_to(parser, CACHE)
    print(f"{given.tokens:,} tokens a run")
    study = Study(Runs(given.runs / f"study_{given.tokens}.jsonl"), given.tokens, given.limit)
    base, tuned = study.go_on()
    report(study, base, tuned)
    if given.plot is not None:
        draw(study, tuned, given.plot)


if __name__ == "__main__":
    main()
