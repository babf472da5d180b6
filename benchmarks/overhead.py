"""What Trainer and PretrainModule cost beside the arithmetic: training speed against a bare loop.

    python benchmarks/overhead.py              # about 15 minutes on one core
    python benchmarks/overhead.py --rounds 1   # three minutes

Sides: a bare loop over the same model, loss, optimizer, clipping and batches; PretrainModule with
TextDataModule under Trainer (CSVLogger, checkpoint callback and logging interval as they are by
default), without and with a progress bar; a LightningModule by hand, with our loss and with that of
transformers. Bar: at a 100 ms step at least 0.97x of the bare loop's tokens per second.

One thread. After each step of the Trainer comes one of the bare loop, in the same process and with
the same batch, so that both see the same moments of the machine; the first steps are not counted.
The ratio is of CPU time (``process_time``), since on a shared machine wall time measures the
neighbours; that of wall time stands beside it. Finished rounds are kept under
benchmarks/cache/overhead and not run again; --fresh forgets them.
"""

import argparse
import contextlib
import json
import os
import platform
import pty
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import lightning
import lightning.pytorch as pl
import torch
import transformers
from hardware import hardware
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_align import PretrainModule, TextDataModule
from lightning_align.layers import Head
from lightning_align.losses import linear_cross_entropy

CACHE = Path(__file__).parent / "cache/overhead"
VOCAB_SIZE = 2048
WARMUP, STEPS = 10, 50  # a whole logging interval of the Trainer, which is 50 steps by default
BAR = 0.97

Figures = dict[str, float]


@dataclass(frozen=True)
class Shape:
    """A model and its batch."""

    hidden_size: int
    num_layers: int
    block_size: int
    batch_size: int

    @property
    def tokens(self) -> int:
        return self.block_size * self.batch_size

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=self.hidden_size,
            intermediate_size=3 * self.hidden_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.hidden_size // 32,
            num_key_value_heads=self.hidden_size // 32,
            max_position_embeddings=self.block_size,
        )


# By what a step takes, roughly.
SHAPES = {
    "100 ms": Shape(hidden_size=128, num_layers=4, block_size=128, batch_size=6),
    "20 ms": Shape(hidden_size=64, num_layers=2, block_size=64, batch_size=8),
    # Unfavourable: a pass over the gradients costs as much as the arithmetic of a few tokens.
    "100 ms, few tokens per parameter": Shape(
        hidden_size=256, num_layers=6, block_size=64, batch_size=2
    ),
}


class SideBySide(pl.Callback):
    """After each step of the Trainer one of the other side: both see the same minute's machine.

    Whatever the Trainer does from the end of one call to the beginning of the next is its step,
    fetching the batch included; the other side is handed the batch.
    """

    def __init__(self, other_step: Callable[[Any], None], steps: int = STEPS) -> None:
        self.other_step = other_step
        self.first, self.last = WARMUP + 1, WARMUP + steps
        self.totals = dict.fromkeys(("cpu_s", "wall_s", "other_cpu_s", "other_wall_s"), 0.0)
        self.left = (0.0, 0.0)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,  # noqa: ARG002
        outputs: Any,  # noqa: ARG002
        batch: Any,
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        arrived = time.process_time(), time.perf_counter()
        # Of this thread: a progress bar may have one of its own, which is none of the other's cost.
        before = time.thread_time(), time.perf_counter()
        self.other_step(batch)
        after = time.thread_time(), time.perf_counter()
        if self.first <= trainer.global_step <= self.last:
            self._add("", self.left, arrived)
            self._add("other_", before, after)
        self.left = time.process_time(), time.perf_counter()

    def _add(self, side: str, begin: tuple[float, float], end: tuple[float, float]) -> None:
        self.totals[side + "cpu_s"] += end[0] - begin[0]
        self.totals[side + "wall_s"] += end[1] - begin[1]


def remembered(name: str, measure: Callable[[], Figures]) -> Figures:
    """The figures of a finished measurement, or those of a new one."""
    path = CACHE / f"{name.replace(' ', '_')}.json"
    if not path.exists():
        figures = measure()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".part").write_text(json.dumps(figures))
        path.with_suffix(".part").replace(path)
    return json.loads(path.read_text())


def spread(values: list[float], digits: int = 0) -> str:
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{middle:,.{digits}f} [{low:,.{digits}f}, {high:,.{digits}f}]"


def text_data(shape: Shape, num_workers: int = 0) -> TextDataModule:
    return TextDataModule(
        "pride_and_prejudice",
        vocab_size=VOCAB_SIZE,
        block_size=shape.block_size,
        batch_size=shape.batch_size,
        num_workers=num_workers,
        cache_dir=CACHE / "tokens",
    )


def model_of(shape: Shape) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(shape.config()).train()


def our_loss(model: LlamaForCausalLM, batch: dict[str, Tensor]) -> Tensor:
    hidden_BTD = model.model(batch["input_ids"][:, :-1], use_cache=False).last_hidden_state
    loss, _, count = linear_cross_entropy(
        hidden_BTD, Head(model.lm_head.weight), batch["labels"][:, 1:]
    )
    return loss / count


def their_loss(model: LlamaForCausalLM, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).loss


class BareLoop:
    """The shortest loop that trains the same model."""

    def __init__(self, shape: Shape) -> None:
        self.model = model_of(shape)
        self.optimizer = PretrainModule(self.model).configure_optimizers()
        self.loss = torch.zeros(())

    def step(self, batch: dict[str, Tensor]) -> None:
        self.loss = our_loss(self.model, batch)
        self.loss.backward()
        clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


class ByHand(pl.LightningModule):
    """What a user would write without us; the optimizer is the same."""

    def __init__(
        self, model: LlamaForCausalLM, loss: Callable[[LlamaForCausalLM, Any], Tensor]
    ) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:  # noqa: ARG002
        loss = self.loss(self.model, batch)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        return PretrainModule(self.model).configure_optimizers()


def train(
    shape: Shape, module: pl.LightningModule, data: Any, bar: pl.Callback | None = None
) -> Figures:
    bare_loop = BareLoop(shape)
    clock = SideBySide(bare_loop.step)
    with tempfile.TemporaryDirectory() as folder, terminal():
        trainer = pl.Trainer(
            max_steps=WARMUP + STEPS,
            accelerator="cpu",
            devices=1,
            gradient_clip_val=1.0,
            logger=CSVLogger(folder),
            callbacks=[clock, *([bar] if bar else [])],
            enable_progress_bar=bar is not None,
            enable_model_summary=False,
            limit_val_batches=0,
            default_root_dir=folder,
        )
        trainer.fit(module, data)
    loss = trainer.callback_metrics["train_loss"].item()
    # By hand with the loss of transformers, one more token is read; else it is the same training.
    assert abs(loss / bare_loop.loss.item() - 1) < 0.01, (loss, bare_loop.loss)
    return clock.totals


def ours(shape: Shape, bar: Callable[[], pl.Callback] | None = None) -> Figures:
    return train(shape, PretrainModule(model_of(shape)), text_data(shape), bar and bar())


def by_hand(shape: Shape, loss: Callable[[LlamaForCausalLM, Any], Tensor]) -> Figures:
    data = text_data(shape)
    data.setup()
    batches = list(islice(data.train_dataloader(), WARMUP + STEPS))
    return train(shape, ByHand(model_of(shape), loss), DataLoader(batches, batch_size=None))


@contextlib.contextmanager
def terminal() -> Iterator[None]:
    """Standard output on a terminal that somebody else reads: else a progress bar does little."""
    master, slave = pty.openpty()
    reader = subprocess.Popen(["cat"], stdin=master, stdout=subprocess.DEVNULL)
    os.close(master)
    with open(slave, "w") as stream, contextlib.redirect_stdout(stream):
        yield
    reader.wait()


SIDES: dict[str, Callable[[Shape], Figures]] = {
    "PretrainModule": ours,
    "PretrainModule, tqdm bar": partial(ours, bar=TQDMProgressBar),
    "PretrainModule, rich bar": partial(ours, bar=RichProgressBar),
    "by hand, our loss": partial(by_hand, loss=our_loss),
    "by hand, transformers' loss": partial(by_hand, loss=their_loss),
}


def report(name: str, rounds: int) -> None:
    shape = SHAPES[name]
    millions = sum(p.numel() for p in model_of(shape).parameters()) / 1e6
    print(f"\n{name} a step: {shape}, {millions:.1f} M parameters, {shape.tokens} tokens")
    columns = "ms CPU", "bare loop", "tokens/s CPU", "bare loop", "wall, ratio", "CPU, ratio"
    print(f"| side | {' | '.join(columns)} |")
    print("|---|---|---|---|---|---|---|")
    runs: dict[str, list[Figures]] = {side: [] for side in SIDES}
    for number in range(rounds):
        for side, run in SIDES.items():
            runs[side].append(remembered(f"step {name} {side} {number}", partial(run, shape)))
    for side, figures in runs.items():
        seconds = {key: [one[key] / STEPS for one in figures] for key in figures[0]}
        both = seconds["cpu_s"], seconds["other_cpu_s"]
        cells = [spread([1e3 * second for second in side_s], 1) for side_s in both]
        cells += [spread([shape.tokens / second for second in side_s]) for side_s in both]
        cells += [
            spread([theirs / ours for theirs, ours in zip(other, own, strict=True)], 3)
            for other, own in (
                (seconds["other_wall_s"], seconds["wall_s"]),
                (seconds["other_cpu_s"], seconds["cpu_s"]),
            )
        ]
        print(f"| {side} | {' | '.join(cells)} |", flush=True)


def arguments(document: str) -> argparse.Namespace:
    """The options that the three benchmarks of overhead share; prints versions and hardware."""
    parser = argparse.ArgumentParser(
        description=document, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="repeats of each side, default 5")
    parser.add_argument("--fresh", action="store_true", help="forget finished rounds of all three")
    options = parser.parse_args()
    if options.fresh:
        shutil.rmtree(CACHE, ignore_errors=True)
    torch.set_num_threads(1)
    print(f"command: python {' '.join(sys.argv)}, {time.strftime('%F')}")
    print(f"python {platform.python_version()}, torch {torch.__version__}, ", end="")
    print(f"lightning {lightning.__version__}, transformers {transformers.__version__}")
    print(f"hardware: {hardware()}, load average {os.getloadavg()[0]:.1f}")
    print(f"{options.rounds} alternated rounds: median [min, max]", flush=True)
    return options


def main() -> None:
    options = arguments(__doc__)
    for name in SHAPES:
        report(name, options.rounds)
    print(f"\nbar: PretrainModule at least {BAR}x at a 100 ms step")


if __name__ == "__main__":
    main()
