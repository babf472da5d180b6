"""What bounds a small run, and does its advice hold? python examples/roofline.py, under a minute.

The machine is measured first. Then a Llama of four blocks trains with recomputed activations and
RooflineMonitor, which says where a step's time goes and what would help it by how much; and once
more without the recomputation, so that one of its predictions stands beside what came of it.
"""

import argparse
import logging
import warnings
from functools import partial

import lightning as L
import torch
from torch.utils.data import DataLoader
from transformers import LlamaConfig

from lightning_align import MachineBalance, PretrainModule, RooflineMonitor

VOCABULARY, ROWS, TOKENS = 512, 4, 128
PARTS = ("data", "forward", "backward", "optimizer")


def trained(machine: MachineBalance, steps: int, *, recomputed: bool) -> RooflineMonitor:
    """A run of some steps, and what its monitor saw."""
    L.seed_everything(0, verbose=False)
    sizes = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4}
    config = LlamaConfig(vocab_size=VOCABULARY, num_attention_heads=4, **sizes)
    optimizer = partial(torch.optim.AdamW, lr=1e-3)
    module = PretrainModule(config, optimizer=optimizer, activation_checkpointing=recomputed)
    rows = torch.randint(VOCABULARY, (steps * ROWS, TOKENS))
    batches = [{"input_ids": part, "labels": part} for part in rows.split(ROWS)]
    monitor = RooflineMonitor(every_n_steps=steps, hardware=machine, plot=False)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        log_every_n_steps=steps // 2,
        callbacks=[monitor],
        default_root_dir="outputs/roofline",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(batches, batch_size=None))
    return monitor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=80)
    steps = parser.parse_args().steps
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    torch.set_num_threads(1)
    machine = MachineBalance.measure()
    flops, stream = machine.peak_flops / 1e9, machine.mem_bandwidth / 1e9
    print(f"this processor: {flops:.0f} GFLOP/s, {stream:.0f} GB/s", end="; ")
    print(f"memory-bound below {machine.ridge_point:.1f} FLOPs a byte")

    run = trained(machine, steps, recomputed=True)
    print(f"a step: {1e3 * run.values['step_s']:.1f} ms, MFU {run.values['mfu']:.0%}", end="; ")
    print(", ".join(f"{part} {run.values[f'{part}_share']:.0%}" for part in PARTS))
    print("\n".join(f"  {each}" for each in run.advice))

    (advice,) = (each for each in run.advice if each.name == "no recomputation")
    other = trained(machine, steps, recomputed=False)
    gain = run.values["step_s"] / other.values["step_s"] - 1
    print(f"without recomputation: predicted {advice.gain:+.1%}, measured {gain:+.1%}")


if __name__ == "__main__":
    main()
