"""A training step on preference pairs: ours in three layouts, plain logits, TRL's trainer.

    python benchmarks/dpo/step.py            # three shapes, about fifteen minutes on one core
    python benchmarks/dpo/step.py --quick    # the same with two repeats and without memory

Needs the extra `peer`. A step is the reference's forward, the policy's forward and backward, and
AdamW: a Llama of 4 blocks, widths 256 and 688, V = 8192, fp32. CPU time (``process_time``) on one
thread; all sides take turns in one process, on the same batch, after a warm-up, and begin with the
same loss. Memory is the peak resident set of one step above what imports, models, optimizer state
and a small step take, one fresh process for each side.

* trl: ``DPOTrainer.compute_loss`` as its ``train`` calls it.
* logits: both models' logits, ``log_softmax``, ``gather``.
* separate, shared, packed, auto: ``DPOModule(prefix_sharing=False, True, True with packing,
  "auto")``.

Bars, of CPU time: long prompts, trl over shared 4, logits over shared 2.6; skewed lengths, trl over
packed 5, packed over shared at most 0.75; long completions, trl over auto 1.9; in all three auto
over the better of separate and shared at most 1.05. Of memory, long prompts: shared over trl at
most 0.06. These are figures of a CPU, where TRL's fused head scores every position; on CUDA it
leaves out the rows without completions.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.append(str(Path(__file__).parents[1]))

from chunked_loss import peak_bytes, spread
from hardware import hardware

from lightning_align import DPOModule

V, D, BETA = 8192, 256, 0.1
Batch = dict[str, Tensor]
# pairs, tokens of a prompt (least, most), of a completion
SHAPES = {
    "long prompts": (2, (390, 410), (40, 50)),
    "skewed lengths": (8, (8, 400), (10, 120)),
    "long completions": (4, (16, 32), (100, 200)),
}
OURS: dict[str, dict[str, Any]] = {
    "separate": {"prefix_sharing": False},
    "shared": {"prefix_sharing": True},
    "packed": {"prefix_sharing": True, "packing": True},
    "auto": {"prefix_sharing": "auto"},
}
SIDES = ["trl", "logits", *OURS]


def make_batch(pairs: int, prompts: tuple[int, int], completions: tuple[int, int]) -> Batch:
    """Right-padded [chosen; rejected] of random tokens, lengths evenly spread over their range."""
    generator = torch.Generator().manual_seed(0)

    def tokens(number: int, least: int, most: int) -> list[Tensor]:
        lengths = torch.linspace(least, most, number).round().long()
        shuffled = lengths[torch.randperm(number, generator=generator)]
        return [torch.randint(1, V, (int(n),), generator=generator) for n in shuffled]

    heads, tails = tokens(pairs, *prompts), tokens(2 * pairs, *completions)
    parts = list(zip(heads * 2, tails, strict=True))
    width = max(len(prompt) + len(completion) for prompt, completion in parts)
    names = ("input_ids", "attention_mask", "completion_mask")
    batch = {name: torch.zeros(2 * pairs, width, dtype=torch.long) for name in names}
    for row, (prompt, completion) in enumerate(parts):
        end = len(prompt) + len(completion)
        batch["input_ids"][row, :end] = torch.cat([prompt, completion])
        batch["attention_mask"][row, :end] = 1
        batch["completion_mask"][row, len(prompt) : end] = 1
    return batch


def make_models() -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    """A policy and a reference a little away from it."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=V,
            hidden_size=D,
            intermediate_size=688,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=1024,
        )
    )
    reference = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return model, reference.requires_grad_(False)


def trl_loss(model: Any, reference: Any) -> tuple[nn.Module, Callable[[Batch], Tensor]]:
    import trl
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<pad>": 0, "a": 1, "<eos>": 2}, "<pad>"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>"
    )
    trainer = trl.DPOTrainer(
        model=model,
        ref_model=reference,
        args=trl.DPOConfig(tempfile.mkdtemp(), use_cpu=True, report_to=[], beta=BETA, bf16=False),
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "a", "rejected": "a"}]),
        processing_class=tokenizer,
    )
    trainer.model.train()
    return trainer.model, lambda batch: trainer.compute_loss(trainer.model, dict(batch))


def logits_loss(model: Any, reference: Any) -> tuple[nn.Module, Callable[[Batch], Tensor]]:
    def logps(of: Any, batch: Batch) -> Tensor:
        logits = of(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        tokens = logits.log_softmax(-1).gather(2, batch["input_ids"][:, 1:, None]).squeeze(2)
        return (tokens * batch["completion_mask"][:, 1:]).sum(1)

    def loss(batch: Batch) -> Tensor:
        with torch.no_grad():
            frozen = logps(reference, batch)
        chosen, rejected = (logps(model, batch) - frozen).chunk(2)
        return -nn.functional.logsigmoid(BETA * (chosen - rejected)).mean()

    return model, loss


def our_loss(
    model: Any, reference: Any, **options: Any
) -> tuple[nn.Module, Callable[[Batch], Tensor]]:
    module = DPOModule(model, reference, beta=BETA, **options)
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_train_batches=0,
        max_epochs=1,
    )
    trainer.fit(module, DataLoader([make_batch(1, (2, 2), (2, 2))], batch_size=None))  # sets it up
    return module.model.train(), module.batch_loss


def make_step(side: str) -> Callable[[Batch], float]:
    """A step of a side on a batch, which gives the loss."""
    model, reference = make_models()
    if side in OURS:
        model, loss_of = our_loss(model, reference, **OURS[side])
    else:
        model, loss_of = (trl_loss if side == "trl" else logits_loss)(model, reference)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def step(batch: Batch) -> float:
        loss = loss_of(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    return step


def measure_time(shape: str, repeats: int) -> tuple[dict[str, list[float]], float]:
    """CPU seconds of each side and repeat; and how far apart the losses before any step are."""
    batch = make_batch(*SHAPES[shape])
    steps = {side: make_step(side) for side in SIDES}
    first = [step(batch) for step in steps.values()]  # the warm-up
    times: dict[str, list[float]] = {side: [] for side in SIDES}
    for _ in range(repeats):
        for side, step in steps.items():
            gc.collect()
            start_s = time.process_time()
            step(batch)
            times[side].append(time.process_time() - start_s)
    return times, max(first) - min(first)


def measure_memory_here(side: str, shape: str) -> float:
    """Peak above base of one step, in MB. Only meaningful in a fresh process."""
    step = make_step(side)
    step(make_batch(1, (4, 4), (4, 4)))
    batch = make_batch(*SHAPES[shape])
    base = peak_bytes()
    step(batch)
    return (peak_bytes() - base) / 1e6


def measure_memory(side: str, shape: str) -> float:
    arguments = [sys.executable, __file__, "--memory-of", side, shape]
    done = subprocess.run(arguments, check=True, capture_output=True, text=True)
    return float(json.loads(done.stdout.splitlines()[-1]))


def ratios(times: dict[str, list[float]]) -> dict[str, float]:
    middle = {side: statistics.median(values) for side, values in times.items()}
    return {
        "trl / separate": middle["trl"] / middle["separate"],
        "trl / shared": middle["trl"] / middle["shared"],
        "trl / packed": middle["trl"] / middle["packed"],
        "trl / auto": middle["trl"] / middle["auto"],
        "logits / shared": middle["logits"] / middle["shared"],
        "packed / shared": middle["packed"] / middle["shared"],
        "auto / better of separate and shared": middle["auto"]
        / min(middle["separate"], middle["shared"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two repeats, without memory")
    parser.add_argument("--shape", choices=list(SHAPES), help="this one alone")
    parser.add_argument("--memory-of", nargs=2, metavar=("SIDE", "SHAPE"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    if arguments.memory_of:
        print(json.dumps(measure_memory_here(*arguments.memory_of)))
        return

    repeats = 2 if arguments.quick else 7
    print(f"command: python {' '.join(sys.argv)}")
    import trl

    versions = f"transformers {transformers.__version__}, trl {trl.__version__}"
    print(f"torch {torch.__version__}, {versions}, python {platform.python_version()}")
    print(f"hardware: {hardware()}; {time.strftime('%F')}")
    print(f"V={V}, D={D}, 4 blocks, fp32, {repeats} alternated repeats: median [min, max]\n")
    for shape, (pairs, prompts, completions) in SHAPES.items():
        if arguments.shape not in (None, shape):
            continue
        times, apart = measure_time(shape, repeats)
        print(f"{shape}: {pairs} pairs, prompts {prompts}, completions {completions}")
        memory = {} if arguments.quick else {side: measure_memory(side, shape) for side in SIDES}
        for side in SIDES:
            of_memory = f", {memory[side]:.0f} MB above base" if memory else ""
            print(f"  {side:9} {spread(times[side], 's CPU')}{of_memory}")
        for name, ratio in ratios(times).items():
            print(f"  {name}: {ratio:.2f}x")
        if memory:
            print(f"  memory, shared / trl: {memory['shared'] / memory['trl']:.3f}x")
        print(f"  first losses differ by {apart:.1e}\n", flush=True)


if __name__ == "__main__":
    main()
