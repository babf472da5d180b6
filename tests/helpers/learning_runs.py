"""Parts of the learning benchmarks: the curve of a run, and runs that are kept once finished."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl


class Curve(pl.Callback):
    """Validation loss by step, and CPU time of the steps alone."""

    def __init__(self) -> None:
        self.found: dict[str, Any] = {"steps": [], "losses": [], "seconds": []}
        self.spent = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        self.start = time.process_time()

    def on_train_batch_end(self, *_: Any) -> None:
        self.spent += time.process_time() - self.start

    def on_validation_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.found["steps"].append(trainer.global_step)
        self.found["losses"].append(float(trainer.callback_metrics["val_loss"]))
        self.found["seconds"].append(self.spent)


def warmup_and_decay(steps: int) -> Callable[[int], float]:
    """Factor of the learning rate: up in a twentieth of the steps, then down to 0."""
    warmup = max(1, steps // 20)
    return lambda step: min((step + 1) / warmup, (steps - step) / (steps - warmup))


def kept_run(path: Path, script: str, *arguments: object, run: bool) -> dict[str, Any] | None:
    """What ``script --one ARGUMENTS`` left at ``path``; it is run, on one thread, if it has not.

    Args:
        path: JSON file that the script writes with :func:`keep`.
        script: The benchmark.
        *arguments: What tells this run from the others.
        run: Whether to run what is not there; else None is returned.
    """
    if not path.exists():
        if not run:
            return None
        command = [sys.executable, script, "--one", *map(str, arguments)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        start = time.monotonic()
        subprocess.run(command, check=True, env=environment, stderr=subprocess.DEVNULL)
        sys.stderr.write(f"{path.stem}: {time.monotonic() - start:.0f} s wall\n")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def keep(found: dict[str, Any], path: Path) -> None:
    """Write what a run found, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(found))
    temporary.rename(path)
