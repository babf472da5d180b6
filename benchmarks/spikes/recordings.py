"""Recordings: loss and gradient norm of real runs with faults, and SpikeDetector over them.

    python benchmarks/spikes/recordings.py                    # evaluate recordings.jsonl.xz
    python benchmarks/spikes/recordings.py --record           # make the runs; resumable
    python benchmarks/spikes/recordings.py --pack             # write them to recordings.jsonl.xz

Small Llamas of 3 blocks and width 32 on six novels, byte by byte, 1200 steps each: AdamW, Muon,
GaLore, LISA, DPO, and accumulation over two batches, of which a fault meets one; six seeds of each,
every other one clipped at 1.0. A run gets three faults at steps that its seed draws: batches of one
or three steps, a learning rate 30 times too high for five, or one weight of 30. Nobody acts on
them. Two seeds of each, those with seed % 3 == 2, stay unseen while a detector is tuned.

A fault is found by an alarm in [start, stop): while it lasts and two steps more, as a learning rate
shows one step later. The 80 steps from its start are not clean: the run has been hit. All others
are, the first ones too. The detector learns of LISA's switches as it does in SpikeGuard.

Beside it stand the rules of the peers (``curves.py``), each at its default and at the threshold
that finds most within 1 false alarm per 10,000 steps, chosen on the runs that it is measured on;
and what the detector finds on the runs that are not held out if it may raise more false alarms.
"""

from __future__ import annotations

import json
import logging
import lzma
import random
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import LlamaConfig

sys.path += [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]  # tests.helpers

from curves import BUDGET, PEERS  # the scripts beside this one
from runs import Runs, arguments, as_tokens, read_novels

from lightning_align import LISA, DPOModule, GaLoreAdamW, Muon, PretrainModule
from lightning_align.stability import SpikeDetector
from tests.helpers.learning_runs import warmup_and_decay

HERE = Path(__file__).parent
PACKED = HERE / "recordings.jsonl.xz"
STEPS, ROWS, LENGTH = 1200, 8, 32
SEEDS = range(6)
AFTERMATH, LATE, LR_STEPS = 80, 2, 5  # steps
FIRST, APART = 250, 300  # steps; each fault lies up to 150 behind the place that these give
KINDS = ("AdamW", "Muon", "GaLore", "LISA", "DPO", "accumulation")

# A language that the model has not seen.
FOREIGN = (
    "Es war an einem truben Morgen im November, als der alte Fuhrmann sein Pferd aus dem Stall "
    "zog und sich auf den Weg zur Stadt machte. Uber den Feldern lag noch der Nebel, und von der "
    "Kirche schlug es sieben. Er hatte seiner Tochter versprochen, vor dem Abend zuruck zu sein, "
    "doch die Wege waren schlecht, und das Rad, das er im Sommer hatte flicken lassen, knarrte "
    "bei jeder Umdrehung. Hinter der Brucke stand ein Junge, der winkte. Ob man ihn mitnehmen "
    "konne, fragte er, er wolle zum Markt und habe die halbe Nacht gewartet. Der Fuhrmann nickte, "
    "ruckte zur Seite, und so fuhren sie schweigend weiter, zwischen kahlen Pappeln und Graben, "
    "in denen das Wasser stand. Erst als die ersten Dacher zu sehen waren, begann der Junge zu "
    "reden: von seinem Bruder, der zur See gefahren sei, von Briefen, die nicht kamen, und davon, "
    "dass er selbst nur noch dieses eine Jahr bleiben werde."
)


def draw_rows(tokens: Tensor, count: int, generator: torch.Generator) -> Tensor:
    starts = torch.randint(len(tokens) - LENGTH - 1, (count, 1), generator=generator)
    return tokens[starts + torch.arange(LENGTH + 1)]


# Batches

Batch = dict[str, Tensor]


def of_rows(ids: Tensor) -> Batch:
    return {"input_ids": ids, "labels": ids.clone()}


def of_pairs(ids: Tensor, draw: random.Random) -> Batch:
    """Half of a row is the prompt; the author's other half is better than one out of order."""
    order = list(range(LENGTH // 2, LENGTH))
    draw.shuffle(order)
    rejected = ids[:, [*range(LENGTH // 2), *order]]
    input_ids = torch.cat([ids[:, :LENGTH], rejected])
    completion = torch.zeros_like(input_ids)
    completion[:, LENGTH // 2 :] = 1
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "completion_mask": completion,
    }


# What happens to a batch


def degenerate(batch: Batch, draw: random.Random) -> Batch:
    """One symbol in every place; of pairs, in the better half."""
    return _in_text(batch, torch.full_like(_text(batch), draw.randrange(97, 123)))


def shuffled(batch: Batch, draw: random.Random) -> Batch:
    text = _text(batch)
    order = draw.sample(range(text.shape[1]), text.shape[1])
    return _in_text(batch, text[:, order])


def foreign(batch: Batch, draw: random.Random) -> Batch:
    text = _text(batch)
    generator = torch.Generator().manual_seed(draw.randrange(2**31))
    rows = draw_rows(as_tokens(FOREIGN.encode()), len(text), generator)
    return _in_text(batch, rows[:, : text.shape[1]])


def wrong_labels(batch: Batch, _: random.Random) -> Batch:
    """Of the row before; of pairs, the worse half for the better one."""
    if "labels" in batch:
        return {**batch, "labels": batch["labels"].roll(1, 0)}
    return {name: rows.roll(len(rows) // 2, 0) for name, rows in batch.items()}


def _text(batch: Batch) -> Tensor:
    """The rows, or the better completions."""
    ids = batch["input_ids"]
    return ids if "labels" in batch else ids[: len(ids) // 2, LENGTH // 2 :]


def _in_text(batch: Batch, text: Tensor) -> Batch:
    if "labels" in batch:
        return of_rows(text)
    ids = batch["input_ids"].clone()
    ids[: len(ids) // 2, LENGTH // 2 :] = text
    return {**batch, "input_ids": ids}


DATA: dict[str, Callable[[Batch, random.Random], Batch]] = {
    "degenerate": degenerate,
    "shuffled": shuffled,
    "foreign": foreign,
    "wrong labels": wrong_labels,
}
FAULTS = (*DATA, "lr jump", "corrupted weight")


def faults_of(kind: str, seed: int) -> list[dict[str, Any]]:
    """Three faults, so that each comes equally often to each kind of run and place."""
    draw = random.Random(f"{kind} {seed}")
    found = []
    for place in range(3):
        name = FAULTS[(KINDS.index(kind) + seed + 2 * place) % len(FAULTS)]
        start = FIRST + APART * place + draw.randrange(150)
        length = 1 if name == "corrupted weight" else draw.choice((1, 3))
        length = LR_STEPS if name == "lr jump" else length
        found.append({"fault": name, "start": start, "stop": start + length})
    return found


# A run


class Plant(pl.Callback):
    """Does the faults that are not in the data, and writes loss and norm down."""

    def __init__(self, faults: list[dict[str, Any]], seed: int) -> None:
        self.faults, self.seed = faults, seed
        self.loss: list[float] = []
        self.norm: list[float] = []

    def on_train_batch_start(self, trainer: Any, module: Any, _batch: Any, batch_idx: int) -> None:
        if batch_idx % trainer.accumulate_grad_batches:
            return
        step, optimizer = trainer.global_step, trainer.optimizers[0]
        for fault in self.faults:
            if fault["fault"] == "lr jump" and fault["start"] <= step < fault["stop"]:
                for group in optimizer.param_groups:  # the schedule sets it again after the step
                    group["lr"] *= 30
            if fault["fault"] == "corrupted weight" and step == fault["start"]:
                block = module.layers.blocks[self.seed % len(module.layers.blocks)]
                with torch.no_grad():
                    block.mlp.down_proj.weight[3, 5] = 30.0  # a flipped bit of the exponent

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        if trainer.global_step > len(self.loss):
            loss, norm = module.measured_step
            self.loss.append(float(f"{float(loss):.5g}"))
            self.norm.append(float(f"{float(norm):.5g}"))


def optimizer_of(kind: str) -> Any:
    if kind == "Muon":
        return partial(Muon, lr=0.01, adjust_lr_fn="match_rms_adamw")
    if kind == "GaLore":
        return partial(GaLoreAdamW, lr=0.01, rank=8, update_proj_gap=50)
    lr = 1e-3 if kind == "DPO" else 5e-3
    return partial(torch.optim.AdamW, lr=lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)


def module_of(kind: str) -> Any:
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    # With label smoothing, without which pairs that are this easy end at a loss of 0.
    dpo = partial(DPOModule, loss_type="cdpo", label_smoothing=0.1)
    make: Any = dpo if kind == "DPO" else PretrainModule
    return make(
        config,
        optimizer=optimizer_of(kind),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(
            optimizer, warmup_and_decay(STEPS)
        ),
    )


def batches_of(kind: str, seed: int, faults: list[dict[str, Any]]) -> Iterator[Batch]:
    tokens, per_step = read_novels(), 2 if kind == "accumulation" else 1
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    for number in range(STEPS * per_step):
        rows = draw_rows(tokens, ROWS, generator)
        batch = of_pairs(rows, draw) if kind == "DPO" else of_rows(rows)
        for fault in faults if number % per_step == 0 else ():
            if fault["fault"] in DATA and fault["start"] <= number // per_step < fault["stop"]:
                batch = DATA[fault["fault"]](batch, draw)
        yield batch


def record(name: str) -> dict[str, Any]:
    kind, seed = name.split("/")[0], int(name.split("/")[1])
    torch.manual_seed(seed)
    faults = faults_of(kind, seed)
    plant = Plant(faults, seed)
    lisa = LISA(1, seed=seed, filename=None) if kind == "LISA" else None
    trainer = pl.Trainer(
        max_steps=STEPS,
        accumulate_grad_batches=2 if kind == "accumulation" else 1,
        gradient_clip_val=1.0 if seed % 2 else None,
        callbacks=[plant, *([lisa] if lisa else [])],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = list(batches_of(kind, seed, faults))
    trainer.fit(module_of(kind), DataLoader(data, batch_size=None))  # type: ignore[arg-type]
    planned = [step for step, _ in lisa.history[1:]] if lisa else []
    return {"loss": plant.loss, "norm": plant.norm, "faults": faults, "planned": planned}


# The detector over them


def is_held_out(name: str) -> bool:
    return int(name.split("/")[1]) % 3 == 2


def alarms_of(run: dict[str, Any], detector: SpikeDetector) -> list[int]:
    found = []
    for step, (loss, norm) in enumerate(zip(run["loss"], run["norm"], strict=True)):
        if step in run["planned"]:
            detector.planned_change("LISA")
        if detector.update(step, loss, norm).is_spike:
            found.append(step)
    return found


def rises(values: list[float], start: int, stop: int) -> bool:
    return max(values[start:stop]) > max(values[start - 100 : start])


class Score:
    """Of a detector, or a peer's rule, over recordings.

    Args:
        runs: By name.
        alarms: Steps at which each run had one.

    Attributes:
        found: By run and fault: delay in steps, or None.
        shown: Which of them took loss or norm above all of the 100 steps before.
        false: Alarms at clean steps, by kind of run.
        clean: Clean steps, by kind of run.
    """

    def __init__(self, runs: dict[str, Any], alarms: Iterable[Sequence[int]]) -> None:
        self.found: list[tuple[str, str, int | None]] = []
        self.shown: list[bool] = []
        self.false: Counter[str] = Counter()
        self.clean: Counter[str] = Counter()
        for (name, run), raised in zip(runs.items(), alarms, strict=True):
            kind = name.split("/")[0]
            clean = set(range(len(run["loss"])))
            for fault in run["faults"]:
                start, stop = fault["start"], fault["stop"] + LATE
                first = next((step for step in raised if start <= step < stop), None)
                self.found.append((kind, fault["fault"], None if first is None else first - start))
                self.shown.append(any(rises(run[name], start, stop) for name in ("loss", "norm")))
                clean -= set(range(start, start + AFTERMATH))
            self.clean[kind] += len(clean)
            self.false[kind] += len(clean.intersection(raised))

    def recall(self, name: str | None = None) -> tuple[int, int]:
        """How many were found of how many, of one kind of run or fault."""
        chosen = [delay for *names, delay in self.found if name is None or name in names]
        return sum(delay is not None for delay in chosen), len(chosen)

    def recall_of_shown(self) -> tuple[int, int]:
        """The same, of faults that can be seen."""
        pairs = zip(self.found, self.shown, strict=True)
        chosen = [delay for (*_, delay), shown in pairs if shown]
        return sum(delay is not None for delay in chosen), len(chosen)

    def false_alarms(self) -> float:
        """Per 10,000 clean steps."""
        return 1e4 * sum(self.false.values()) / max(1, sum(self.clean.values()))


def table(parts: dict[str, Score], names: Iterable[str]) -> None:
    print("\n| | " + " | ".join(parts) + " |\n|---|" + "---:|" * len(parts))

    def row(title: str, cell: Callable[[Score], str]) -> None:
        print(f"| {title} | " + " | ".join(cell(score) for score in parts.values()) + " |")

    row("recall (0.9)", lambda score: f"{_share(*score.recall()):.3f}")
    row("recall of those that show", lambda score: f"{_share(*score.recall_of_shown()):.3f}")
    row("false alarms per 10,000 clean steps (1)", lambda score: f"{score.false_alarms():.2f}")
    row("clean steps", lambda score: f"{sum(score.clean.values()):,}")
    row(
        "median delay, steps",
        lambda score: f"{median([d for *_, d in score.found if d is not None] or [-1]):g}",
    )
    for name in names:
        row(f"found, {name}", lambda score, name=name: "{} of {}".format(*score.recall(name)))
    for kind in KINDS:
        row(f"false alarms, {kind}", lambda score, kind=kind: str(score.false[kind]))


def _share(part: int, whole: int) -> float:
    return part / max(1, whole)


def load() -> dict[str, Any]:
    """The recordings by name, from the file beside this script."""
    with lzma.open(PACKED, "rt") as file:
        return {run.pop("name"): run for run in map(json.loads, file)}


def pack(runs: dict[str, Any]) -> None:
    if missing := [name for name in NAMES if name not in runs]:
        sys.exit(f"not packed: {len(missing)} runs are missing. Make them with --record.")
    lines = []
    for name in NAMES:
        fields = {key: runs[name][key] for key in ("loss", "norm", "faults", "planned")}
        lines.append(json.dumps({"name": name, **fields}, separators=(",", ":")) + "\n")
    PACKED.write_bytes(lzma.compress("".join(lines).encode(), preset=9))
    print(f"{len(lines)} runs, {PACKED.stat().st_size:,} bytes")


NAMES = [f"{kind}/{seed}" for seed in SEEDS for kind in KINDS]


def ours(runs: dict[str, Any], **arguments: Any) -> Score:
    return Score(runs, (alarms_of(run, SpikeDetector(**arguments)) for run in runs.values()))


def cell(score: Score) -> str:
    return "{} of {}, {:.2f}".format(*score.recall(), score.false_alarms())


def peers(parts: dict[str, dict[str, Any]]) -> None:
    """Faults found, and false alarms per 10,000 clean steps, of each rule."""
    print("\n| found, false alarms | " + " | ".join(parts) + " |\n|---|" + "---:|" * len(parts))
    print("| SpikeDetector | " + " | ".join(cell(ours(runs)) for runs in parts.values()) + " |")
    for peer in PEERS:
        defaults, bests = [], []
        for runs in parts.values():
            series = [np.array([run[name] for run in runs.values()]) for name in ("loss", "norm")]

            def score(
                threshold: float, runs: Any = runs, series: Any = series, rule: Any = peer.rule
            ) -> Score:
                raised = rule(*series, np.array([threshold]))[0]
                return Score(runs, [np.flatnonzero(row).tolist() for row in raised])

            defaults.append(cell(score(peer.default)))
            within = [(one, at) for at in peer.grid if (one := score(at)).false_alarms() <= BUDGET]
            most, at = max(within, key=lambda pair: pair[0].recall())
            bests.append(f"{cell(most)} (at {at:.2f})")
        print(f"| {peer.name} {peer.default:g} (default) | " + " | ".join(defaults) + " |")
        print(f"| {peer.name}, best | " + " | ".join(bests) + " |")


def evaluate(runs: dict[str, Any]) -> None:
    parts = {
        "held out": {name: run for name, run in runs.items() if is_held_out(name)},
        "the others": {name: run for name, run in runs.items() if not is_held_out(name)},
    }
    table({title: ours(part) for title, part in parts.items()}, (*FAULTS, *KINDS))
    peers(parts)
    print("\nThe detector over the others if its thresholds aim at more false alarms per step:")
    for aim in (5e-6, 1e-5, 2e-5, 5e-5, 2e-4):
        print(f"{aim:g}: {cell(ours(parts['the others'], false_alarms=aim))}")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--record", action="store_true", help="make what is missing of the runs")
    parser.add_argument("--pack", action="store_true", help="write finished runs to the file")
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    print(f"torch {torch.__version__}, lightning {pl.__version__}")
    if PACKED.exists() and not (given.record or given.pack):
        evaluate(load())
        return
    runs = Runs(given.runs / "recordings.jsonl")
    if not given.pack:
        runs.finish(NAMES, record, given.limit)
        evaluate({name: runs.found[name] for name in NAMES if name in runs.found})
    else:
        pack(runs.found)


if __name__ == "__main__":
    main()
