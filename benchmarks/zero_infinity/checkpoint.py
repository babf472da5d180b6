"""A checkpoint of zero_infinity by links against a full copy of the same states, durable both.

    python benchmarks/zero_infinity/checkpoint.py            # 1 minute, 3.2 GB of disk
    python benchmarks/zero_infinity/checkpoint.py --small    # seconds, 0.1 GB: does it run

``trainer.save_checkpoint`` as ModelCheckpoint calls it, of a module with 50 M parameters and AdamW:
0.6 GB of states. By links: ``save_distributed_checkpoint=True``, a folder. A full copy: False, one
file, written piece by piece from the same files and synced. A step is trained before each save, so
that there is something new, and what it wrote is made durable before either side begins, as the
commit would do behind it; sides alternate, and the first round is not counted. Told beside it: what
the steps after either take, for one after links writes new files; anonymous memory that a save
adds; and what an AsyncCheckpoint of the same state makes training wait.

Bar: 1 % of the copy's time. What is written is deleted.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parents[1]))

from hardware import hardware

from lightning_align import AsyncCheckpoint, ZeROInfinityStrategy


class Layers(pl.LightningModule):
    """Linear layers, one a block; what they learn is nothing."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.width = width
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(count))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:  # noqa: ARG002
        for layer in self.layers:
            batch = batch + layer(batch).tanh()
        return batch.square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3, fused=True)


def anonymous_bytes() -> int:
    """Memory of this process that is no file's."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) << 10 for line in status.splitlines() if "RssAnon" in line)


class Saves(pl.Callback):
    """Saves after every step, by turns; notes what saves and the steps behind them take."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seconds: dict[str, list[float]] = {"links": [], "copy": []}
        self.steps: dict[str, list[float]] = {"links": [], "copy": []}
        self.memory: dict[str, int] = {"links": 0, "copy": 0}
        self.last, self.since = "", 0.0

    def on_train_batch_start(self, *_: object) -> None:
        self.since = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        strategy = trainer.strategy
        assert isinstance(strategy, ZeROInfinityStrategy)
        if self.last:
            self.steps[self.last].append(time.perf_counter() - self.since)
        side = "copy" if self.last == "links" else "links"
        strategy.save_distributed_checkpoint = side == "links"
        assert strategy._engine is not None
        strategy._engine.store.make_durable()
        path, before = self.folder / f"{side}.ckpt", anonymous_bytes()
        start = time.perf_counter()
        trainer.save_checkpoint(path)
        self.seconds[side].append(time.perf_counter() - start)
        self.memory[side] = max(self.memory[side], anonymous_bytes() - before)
        self.last = side
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def train(folder: Path, module: Layers, callback: pl.Callback, steps: int) -> pl.Trainer:
    """Steps of a small batch, each in a window of its own."""
    trainer = pl.Trainer(
        accelerator="cpu",
        strategy=ZeROInfinityStrategy(nvme_path=str(folder / "nvme"), overwrite=True),
        max_steps=steps,
        logger=False,
        enable_checkpointing=isinstance(callback, AsyncCheckpoint),
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[callback],
    )
    batches = torch.randn(steps, 8, module.width)
    trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
    return trainer


def stalls(folder: Path, build: Callable[[], Layers]) -> list[float]:
    """Seconds that training waits for saves of AsyncCheckpoint, which a thread writes behind it."""
    found: list[float] = []

    class Noted(AsyncCheckpoint):
        def _save(self, *args: object, **options: object) -> None:
            start = time.perf_counter()
            super()._save(*args, **options)  # type: ignore[arg-type]
            found.append(time.perf_counter() - start)

    options = {"every_n_train_steps": 2, "backpressure": "skip"}
    train(folder, build(), Noted(folder / "saved", **options), 6).strategy.close()
    return found


def main() -> None:
    """Both sides, then the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="does it run")
    parser.add_argument("--rounds", type=int, default=6, help="saves of each side that count")
    parser.add_argument("--folder", help="where to write; by default a temporary folder here")
    options = parser.parse_args()
    width, count = (256, 8) if options.small else (1448, 24)

    def build() -> Layers:
        return Layers(width, count)

    start = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=options.folder or Path.cwd()) as name:
        folder, saves = Path(name), Saves(Path(name))
        train(folder, build(), saves, 2 * (options.rounds + 1) + 1).strategy.close()
        waited = stalls(folder, build)
    parameters = sum(p.numel() for p in build().parameters())
    counted = {side: seconds[1 : options.rounds + 1] for side, seconds in saves.seconds.items()}
    middle = {side: median(seconds) for side, seconds in counted.items()}
    print(f"{parameters / 1e6:.0f} M parameters, {12 * parameters / 1e6:.0f} MB of states")
    for side, seconds in counted.items():
        after = median(saves.steps[side][1:])
        print(
            f"{side:6} {1e3 * middle[side]:8.1f} ms ({1e3 * min(seconds):.1f} to"
            f" {1e3 * max(seconds):.1f}), {saves.memory[side] / 1e6:.1f} MB of memory; the step"
            f" behind it {1e3 * after:.0f} ms"
        )
    print(f"AsyncCheckpoint: training waits {1e3 * median(waited):.1f} ms")
    ratio = middle["links"] / middle["copy"]
    print(f"links over copy: {100 * ratio:.2f} % (bar 1 %)")
    print(json.dumps({"seconds": counted, "steps": saves.steps, "ratio": ratio}))
    print(hardware())
    print(f"{time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__":
    main()
