"""Draw docs/images/fully_sharded.png: what a rank holds of a parameter, by the planner's formulas.

By hand: `python docs/draw_fully_sharded.py`. Activations are left out: these lines are of weights,
gradients and AdamW's moments, in fp32, on the fullest rank of a Llama of 8 B.
"""

from pathlib import Path
from typing import Any

from transformers import LlamaConfig

from lightning_align import ModelSpec, ParallelSpec
from lightning_align.figure import new_figure
from lightning_align.planner.memory import GRADIENTS, OPTIMIZER, WEIGHTS, device_memory

PICTURE = Path(__file__).parent / "images" / "fully_sharded.png"
RANKS = (1, 2, 4, 8, 16, 32)
LLAMA = LlamaConfig(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
    num_attention_heads=32, num_key_value_heads=8,
)  # fmt: skip
SPLITS: dict[str, dict[str, Any]] = {
    "DDP": {},
    "pipeline (the fullest stage)": {"pipeline_parallel": None},
    "fully sharded (FSDP2)": {"zero_stage": 3},
    "ZeRO-Infinity": {
        "zero_stage": 3, "offload_param": "cpu", "offload_optimizer": "cpu",
    },
}  # fmt: skip


def held(model: ModelSpec, ranks: int, split: dict[str, Any]) -> float:
    """Bytes a parameter that the fullest of so many ranks has on its device."""
    own = {name: ranks if value is None else value for name, value in split.items()}
    micro_batches = ranks if "pipeline_parallel" in own else 1
    options = {"global_batch_size": micro_batches, **own} if micro_batches > 1 else own
    parts = device_memory(model, ParallelSpec(devices=ranks, precision="32-true", **options))
    return sum(parts[name] for name in (WEIGHTS, GRADIENTS, OPTIMIZER)) / model.parameters


def main() -> None:
    """Draw a line for each way to divide, over the number of ranks."""
    model = ModelSpec.from_config(LLAMA, seq_len=2048)
    figure = new_figure(7, 3.6)
    axes = figure.subplots()
    for name, split in SPLITS.items():
        values = [held(model, ranks, split) for ranks in RANKS]
        print(name, [round(value, 2) for value in values])  # noqa: T201
        axes.plot(RANKS, values, marker="o", markersize=4, label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(RANKS, [str(ranks) for ranks in RANKS])
    ticks = (0.25, 0.5, 1, 2, 4, 8, 16)
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xlabel("ranks")
    axes.set_ylabel("bytes a parameter on a rank's device")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE)


if __name__ == "__main__":
    main()
