"""Plant a loss spike in a small run, and heal it: python examples/spike_guard.py, about a minute.

A Llama of two layers learns a random grammar with a learning rate that is near its limit. Three of
its batches are broken: the same token everywhere, as from a file of padding. The run is done as if
they had not been there, with them, and with SpikeGuard, which skips their steps, or goes back and
leaves them out.
"""

import argparse
import logging
import warnings
from functools import partial
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import LlamaConfig

from lightning_align import PretrainModule, SpikeGuard
from lightning_align.figure import new_figure
from lightning_align.reports.pictures import draw, write_file

VOCABULARY, ROWS, TOKENS = 64, 16, 65


def grammar_batches(count: int) -> list[dict[str, Tensor]]:
    """Batches of text in which each token has four that may follow it."""
    generator = torch.Generator().manual_seed(0)
    followers = torch.randint(VOCABULARY, (VOCABULARY, 4), generator=generator)
    batches = []
    for _ in range(count):
        ids = torch.empty(ROWS, TOKENS, dtype=torch.long)
        ids[:, 0] = torch.randint(VOCABULARY, (ROWS,), generator=generator)
        for place in range(1, TOKENS):
            choice = torch.randint(4, (ROWS,), generator=generator)
            ids[:, place] = followers[ids[:, place - 1], choice]
        batches.append({"input_ids": ids, "labels": ids})
    return batches


def broken(batches: list[dict[str, Tensor]], first: int) -> list[dict[str, Tensor]]:
    """The same with three batches that are one token."""
    padding = torch.full((ROWS, TOKENS), 7)
    return [
        {"input_ids": padding, "labels": padding} if first <= number < first + 3 else batch
        for number, batch in enumerate(batches)
    ]


class Losses(L.Callback):
    """The loss of each step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        """Note it."""
        self.values.append(float(trainer.callback_metrics["train_loss"]))


def run(batches: list[dict[str, Tensor]], guard: SpikeGuard | None = None) -> list[float]:
    """Train, and return the losses."""
    L.seed_everything(0, verbose=False)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config = LlamaConfig(vocab_size=VOCABULARY, num_attention_heads=2, **sizes)
    optimizer = partial(torch.optim.AdamW, lr=0.03, betas=(0.9, 0.999), weight_decay=0.0)
    losses = Losses()
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=[losses, *([guard] if guard else [])],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = DataLoader(batches, batch_size=None)
    trainer.fit(PretrainModule(config, optimizer=optimizer), loader)
    return losses.values


def picture(file: str, curves: dict[str, list[float]]) -> None:
    """Draw the losses of all runs, from a little before the spike on."""
    figure = new_figure(7, 3)
    axes = figure.add_subplot()
    for name, losses in curves.items():
        axes.plot(losses, label=name, linewidth=1)
    last = max(map(len, curves.values()))
    axes.set(xlabel="batch that was trained", ylabel="loss, nats per token", yscale="log")
    axes.set(xlim=(last // 2, last), ylim=(1.2, None))
    axes.legend()
    write_file(file, draw(figure)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--picture", help="PNG file to draw the losses to")
    options = parser.parse_args()
    steps = options.steps
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    clean = grammar_batches(steps + 20)
    with_spike = broken(clean, first=2 * steps // 3)
    rewind = SpikeGuard(
        "rewind", rewind_steps=10, skip_batches=5, snapshot_every_n_steps=10, preview_tokens=0
    )
    runs = {
        "no spike": (clean, None),
        "unguarded": (with_spike, None),
        "skip": (with_spike, SpikeGuard("skip", preview_tokens=0)),
        "rewind": (with_spike, rewind),
    }
    curves = {}
    print("run          worst loss from the spike on    loss of the last 20 steps")
    for name, (batches, guard) in runs.items():
        losses = curves[name] = run(batches, guard)
        worst, last = max(losses[2 * steps // 3 + 3 :]), sum(losses[-20:]) / 20
        print(f"{name:12} {worst:28.3f}    {last:25.3f}")
        for incident in guard.report.incidents if guard else []:
            print(f"             step {incident.step}: {incident.reason}, {incident.action}")
    if options.picture:
        picture(options.picture, curves)


if __name__ == "__main__":
    main()
