"""Memory and time of a step: full fine-tuning, PEFT's LoRA and LISA, in one process.

    python benchmarks/lisa/memory.py            # minutes on one core
    python benchmarks/lisa/memory.py --smoke    # seconds; the times then mean nothing

The same Llama (8 blocks, width 128, untied), batches and loss code (PretrainModule in a Trainer,
AdamW) on all sides; LoRA has rank 16 at every linear layer of the blocks. Live bytes
are weights, gradients, optimizer state and what autograd saves for backward, each storage once;
their peak is taken over all moments of a step, over steps with many draws. The optimizer's own
temporaries and freed activations inside of an operation are not in it, for no side.
"""

import argparse
import logging
import platform
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from statistics import median
from typing import Any

import lightning
import lightning.pytorch as pl
import peft
import torch
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_align import LISA, PretrainModule
from lightning_align.planner.live_bytes import LiveBytes

WIDTH, BLOCKS, MLP, VOCABULARY, TOKENS = 128, 8, 344, 512, 512
VOCABULARIES = (512, 2048, 8192, 32_000, 128_000)
MIB = 2**20


def llama(vocabulary: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=MLP,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def plain(vocabulary: int) -> Any:
    return llama(vocabulary)


def lora(vocabulary: int) -> Any:
    config = peft.LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(llama(vocabulary), config).get_base_model()


@dataclass(frozen=True)
class Side:
    """A way to train: its model, and the arguments of LISA if it takes part."""

    model: Callable[[int], Any] = plain
    lisa: dict[str, Any] | None = None

    def trainer(self, steps: int, *callbacks: pl.Callback, interval: int = 2) -> pl.Trainer:
        ours = (
            []
            if self.lisa is None
            else [LISA(2, interval_steps=interval, filename=None, **self.lisa)]
        )
        return pl.Trainer(
            max_steps=steps,
            max_epochs=-1,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[*callbacks, *ours],
        )

    def module(self, vocabulary: int) -> PretrainModule:
        adamw = partial(torch.optim.AdamW, lr=1e-4, weight_decay=0.1)
        return PretrainModule(self.model(vocabulary), optimizer=adamw)


SIDES = {
    "full": Side(),
    "LoRA r16 (peft)": Side(lora),
    "LISA 2, drop": Side(lisa={}),
    "LISA 2, keep": Side(lisa={"optimizer_state": "keep"}),
    "LISA 2, drop, embedding frozen": Side(lisa={"train_embeddings": False}),
    "LISA 2, drop, blocks only": Side(lisa={"train_embeddings": False, "train_head": False}),
}


class Live(pl.Callback):
    """Live bytes by kind, at the worst moment of all steps."""

    live: LiveBytes

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.live = live = LiveBytes(pl_module)
        step = type(pl_module).training_step

        def measured(batch: Any, batch_idx: int) -> Any:
            live.look(trainer.optimizers[0])
            with live.saving(batch.values()):
                return step(pl_module, batch, batch_idx)

        vars(pl_module)["training_step"] = measured

    def on_before_backward(self, *_: Any) -> None:
        self.live.look()  # zero_grad has been called

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.live.look(trainer.optimizers[0])  # first in line: before LISA frees gradients


def batches(vocabulary: int, tokens: int) -> Any:
    rows = max(1, tokens // 128)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (8, rows, tokens // rows + 1), generator=generator)
    return DataLoader([{"input_ids": row, "labels": row} for row in ids], batch_size=None)


def memory(side: Side, vocabulary: int, tokens: int, steps: int) -> LiveBytes:
    watch = Live()
    side.trainer(steps, watch).fit(side.module(vocabulary), batches(vocabulary, tokens))
    return watch.live


class CpuTime(pl.Callback):
    """CPU seconds of each step, from one batch's start to the next one's."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.marks.append(time.process_time())


def seconds(side: Side, steps: int) -> float:
    """Median CPU seconds of a step, with a draw every 20 steps."""
    timer = CpuTime()
    trainer = side.trainer(steps + 4, timer, interval=20)
    trainer.fit(side.module(VOCABULARY), batches(VOCABULARY, TOKENS))
    marks = timer.marks[4:]
    return median(later - earlier for earlier, later in pairwise(marks))


# The token count at which LISA begins to need less than LoRA


@dataclass(frozen=True)
class Formula:
    """Peak bytes of a side, from its numbers of parameters and two measurements.

    Weights and moments are always there. LISA's gradients are not there during the forward, nor
    what autograd saved at the end of backward, so the larger of both counts; LoRA has no callback,
    and Lightning keeps its gradients through the next forward.
    """

    weights: Callable[[int], int]
    trained: Callable[[int], int]
    frees_gradients: bool
    per_token: float
    constant: Callable[[int], int]  # what the loss keeps whatever the number of tokens

    def peak(self, vocabulary: int, tokens: float) -> float:
        weights, trained = self.weights(vocabulary), self.trained(vocabulary)
        saved = self.per_token * tokens + self.constant(vocabulary)
        if self.frees_gradients:
            return 4 * weights + 8 * trained + max(saved, 4 * trained)
        return 4 * weights + 12 * trained + saved


def formula(name: str, smoke: bool) -> Formula:
    side, steps = SIDES[name], 4 if smoke else 24
    low, high = (memory(side, VOCABULARY, t, steps).saved_peak for t in (TOKENS, 2 * TOKENS))
    sizes = {p: p.numel() for p in plain(VOCABULARY).model.layers[0].parameters()}
    block = sum(sizes.values())
    adapters = 16 * (4 * 2 * WIDTH + 3 * (WIDTH + MLP)) * BLOCKS
    is_lora = side.lisa is None
    options = side.lisa or {}
    matrices = options.get("train_embeddings", True) + options.get("train_head", True)
    norm = WIDTH if options.get("train_head", True) else 0

    def weights(vocabulary: int) -> int:
        return 2 * vocabulary * WIDTH + BLOCKS * block + WIDTH + (adapters if is_lora else 0)

    def trained(vocabulary: int) -> int:
        return adapters if is_lora else matrices * vocabulary * WIDTH + 2 * block + norm

    slope = (high - low) / TOKENS
    head = not is_lora and options.get("train_head", True)
    # The chunked loss makes the head's gradient in forward and hands it on in backward.
    rest = low - slope * TOKENS - (4 * VOCABULARY * WIDTH if head else 0)
    return Formula(
        weights,
        trained,
        not is_lora,
        slope,
        lambda vocabulary: int(rest) + (4 * vocabulary * WIDTH if head else 0),
    )


def crossing(lisa: Formula, lora: Formula, vocabulary: int) -> float | None:
    """Tokens per step above which LISA needs less; None if that is never so."""
    low, high = 0.0, 1e9
    if lisa.peak(vocabulary, high) >= lora.peak(vocabulary, high):
        return None
    while high - low > 1:
        middle = (low + high) / 2
        below = lisa.peak(vocabulary, middle) < lora.peak(vocabulary, middle)
        low, high = (low, middle) if below else (middle, high)
    return high


def report(smoke: bool) -> None:
    steps = 4 if smoke else 40
    print(f"\nMiB at {TOKENS} tokens per step, vocabulary {VOCABULARY}, over {steps // 2} draws")
    print("| side | weights | gradients | optimizer | saved | sum | peak of live bytes |")
    print("|---|---|---|---|---|---|---|")
    sums, peaks = {}, {}
    for name, side in SIDES.items():
        live = memory(side, VOCABULARY, TOKENS, steps)
        parts = [live.weights, live.gradient_peak, live.optimizer_peak, live.saved_peak]
        sums[name], peaks[name] = sum(parts), live.peak
        cells = " | ".join(f"{part / MIB:.2f}" for part in [*parts, sum(parts), live.peak])
        print(f"| {name} | {cells} |", flush=True)
    for what, found in (("sum", sums), ("peak", peaks)):
        ours = found["LISA 2, drop"]
        print(
            f"{what}: LISA / LoRA r16 = {ours / found['LoRA r16 (peft)']:.3f} (bar 0.92), "
            f"LISA / full = {ours / found['full']:.3f} (bar 0.68)"
        )
    report_crossings(smoke)
    report_times(1 if smoke else 7, 4 if smoke else 40)


def report_crossings(smoke: bool) -> None:
    names = [name for name in SIDES if name.startswith("LISA 2, drop")]
    lora_formula = formula("LoRA r16 (peft)", smoke)
    formulas = {name: formula(name, smoke) for name in names}
    checked = VOCABULARIES[:1] if smoke else VOCABULARIES[:3]
    worst = 0.0
    for name, predicted in {"LoRA r16 (peft)": lora_formula, **formulas}.items():
        for vocabulary in checked:
            for tokens in (128, 2048):
                measured = memory(SIDES[name], vocabulary, tokens, 4 if smoke else 24).peak
                worst = max(worst, abs(predicted.peak(vocabulary, tokens) / measured - 1))
    print(
        f"\nformula against measured peaks, vocabularies {checked}, 128 and 2048 tokens: ", end=""
    )
    print(f"largest difference {100 * worst:.1f} %")
    print("Tokens per step above which LISA (2 of 8 blocks, drop) needs less than LoRA r16:")
    print("| vocabulary | " + " | ".join(names) + " |")
    print("|---|" + "---|" * len(names))
    for vocabulary in VOCABULARIES:
        found = [crossing(formulas[name], lora_formula, vocabulary) for name in names]
        cells = " | ".join("never" if n is None else f"{n:,.0f}" for n in found)
        print(f"| {vocabulary:,} | {cells} |", flush=True)


def report_times(repeats: int, steps: int) -> None:
    names = ["full", "LoRA r16 (peft)", "LISA 2, drop"]
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(repeats):
        for name in names:
            times[name].append(seconds(SIDES[name], steps))
    print(f"\nCPU ms of a step, {repeats} alternated repeats of {steps} steps: median, min, max")
    for name, found in times.items():
        print(f"{name}: {1e3 * median(found):.1f}, {1e3 * min(found):.1f}, {1e3 * max(found):.1f}")
    for name, bar in (("full", " (bar 0.85)"), ("LoRA r16 (peft)", "")):
        pairs = zip(times["LISA 2, drop"], times[name], strict=True)
        print(f"LISA / {name}: {median(ours / theirs for ours, theirs in pairs):.3f}{bar}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="few steps")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    print(
        f"torch {torch.__version__}, lightning {lightning.__version__}, peft {peft.__version__}, "
        f"{platform.machine()}, 1 thread"
    )
    report(arguments.smoke)


if __name__ == "__main__":
    main()
