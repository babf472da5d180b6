"""A training step on preference pairs: ours in each layout, plain logits, Liger, TRL's trainer.

    python benchmarks/dpo/step.py            # three shapes, about ten minutes on one core
    python benchmarks/dpo/step.py --repeats 2 --no-memory
    python benchmarks/dpo/step.py --tiny     # a model of no size, to see that everything runs

Needs the extra `peer`; the side `liger` is there if `liger_kernel` can be imported (its losses need
no Triton: ``pip install --no-deps --target FOLDER liger-kernel`` and FOLDER in PYTHONPATH).

A step is the reference's forward, the policy's forward and backward, and AdamW: a Llama of 4
blocks, widths 256 and 688, V = 8192, fp32. CPU time (``process_time``) on one thread; all sides
take turns in one process, on the same batch, after a warm-up, and begin with the same loss.

* trl: ``DPOTrainer.compute_loss`` as its ``train`` calls it.
* logits: both models' logits, ``log_softmax``, ``gather``.
* liger: ``LigerFusedLinearDPOLoss(compiled=False)`` on both models' hidden states.
* separate, shared, packed, auto: ``DPOModule(prefix_sharing=False, True, True with packing,
  "auto")``.
* cached: auto with ``precompute_ref_log_probs=True``, so without the reference's forward.
* recomputed: cached with ``activation_checkpointing=True``, for memory alone.

Bars, of CPU time: long prompts, trl over shared 4, trl over cached 5.3, the fastest other way over
shared 2.6; skewed lengths, trl over packed 5, packed over shared at most 0.75; long completions,
trl over auto 1.9; in all three auto over the better of separate and shared at most 1.05. Of memory,
long prompts: shared over trl at most 0.06. These are figures of a CPU, where TRL's fused head
scores every position; on CUDA it leaves out the rows without completions.

Memory is the peak of one step above its base, one fresh process for each side, in three measures.
Base is what is there before the step: imports, both models' weights, gradients, optimizer states,
the inputs. So above it are activations and temporary tensors.

* tensors: bytes of all that torch allocates in the step, less what it frees, at most.
* resident: the resident set; what the allocator holds free is given back before base is taken. The
  largest of three steps behind one of the same shape.
* kept heap: the same, but base is taken with what the allocator holds free from the steps before.
  It sees little but allocations of more than 32 MiB, which glibc maps anew each time: logits.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import importlib.metadata
import importlib.util
import json
import logging
import os
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
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.append(str(Path(__file__).parents[1]))

from chunked_loss import spread
from hardware import hardware

from lightning_align import DPOModule

V, D, INNER, HEADS, BETA = 8192, 256, 688, 4, 0.1
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
    "cached": {"precompute_ref_log_probs": True},
    "recomputed": {"precompute_ref_log_probs": True, "activation_checkpointing": True},
}
LIGER = ["liger"] if importlib.util.find_spec("liger_kernel") else []
SIDES = ["trl", "logits", *LIGER, *OURS]
TIMED = [side for side in SIDES if side != "recomputed"]
MEMORY_SHAPE = "long prompts"
Loss = tuple[nn.Module, Callable[[Batch], Tensor]]


class OneBatch(pl.LightningDataModule):
    """A batch of pairs that says which completions it has."""

    def __init__(self, batch: Batch) -> None:
        super().__init__()
        self.batch = batch

    def completions(self) -> list[list[tuple[Any, Any]]]:
        rows = []
        for ids, mask, completion in zip(*(self.batch[key] for key in KEYS), strict=True):
            is_prompt = mask.bool() & ~completion.bool()
            rows.append((ids[is_prompt].numpy(), ids[completion.bool()].numpy()))
        pairs = len(rows) // 2
        return [[rows[pair], rows[pairs + pair]] for pair in range(pairs)]

    def train_dataloader(self) -> DataLoader[Batch]:
        return DataLoader([self.batch], batch_size=None)


KEYS = ("input_ids", "attention_mask", "completion_mask")


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
    batch = {name: torch.zeros(2 * pairs, width, dtype=torch.long) for name in KEYS}
    batch["number"] = torch.arange(pairs)
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
            intermediate_size=INNER,
            num_hidden_layers=4,
            num_attention_heads=HEADS,
            max_position_embeddings=1024,
        )
    )
    reference = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return model, reference.requires_grad_(False)


def trl_loss(model: Any, reference: Any) -> Loss:
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
    return trainer.model, lambda batch: trainer.compute_loss(
        trainer.model, {key: batch[key] for key in KEYS}
    )


def logits_loss(model: Any, reference: Any) -> Loss:
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


def liger_loss(model: Any, reference: Any) -> Loss:
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    head = LigerFusedLinearDPOLoss(beta=BETA, compiled=False)

    def loss(batch: Batch) -> Tensor:
        tokens = {key: batch[key] for key in ("input_ids", "attention_mask")}
        hidden = model.model(**tokens).last_hidden_state[:, :-1]
        with torch.no_grad():
            frozen = reference.model(**tokens).last_hidden_state[:, :-1]
        is_target = batch["completion_mask"][:, 1:].bool()
        targets = batch["input_ids"][:, 1:].where(is_target, -100)
        weights = model.lm_head.weight, reference.lm_head.weight
        return head(weights[0], hidden, targets, ref_input=frozen, ref_weight=weights[1])[0]

    return model, loss


def our_loss(model: Any, reference: Any, batch: Batch, **options: Any) -> Loss:
    if "precompute_ref_log_probs" in options:
        options["ref_cache_dir"] = tempfile.mkdtemp()
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
    trainer.fit(module, datamodule=OneBatch(batch))  # sets it up
    return module.model.train(), module.batch_loss


def make_step(side: str, batch: Batch) -> Callable[[], float]:
    """A step of a side on a batch, which gives the loss."""
    model, reference = make_models()
    if side in OURS:
        model, loss_of = our_loss(model, reference, batch, **OURS[side])
    else:
        make = {"trl": trl_loss, "logits": logits_loss, "liger": liger_loss}[side]
        model, loss_of = make(model, reference)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def step() -> float:
        loss = loss_of(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)  # gradients are there before a step, too
        return float(loss)

    return step


def measure_time(shape: str, repeats: int) -> tuple[dict[str, list[float]], float]:
    """CPU seconds of each side and repeat; and how far apart the losses before any step are."""
    batch = make_batch(*SHAPES[shape])
    steps = {side: make_step(side, batch) for side in TIMED}
    first = [step() for step in steps.values()]  # the warm-up
    times: dict[str, list[float]] = {side: [] for side in TIMED}
    for _ in range(repeats):
        for side, step in steps.items():
            gc.collect()
            start_s = time.process_time()
            step()
            times[side].append(time.process_time() - start_s)
    return times, max(first) - min(first)


def resident(key: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most."""
    with open("/proc/self/status") as lines:
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))


def measure_memory_here(side: str) -> dict[str, float]:
    """Peaks above base of a step, in MB; Linux, and only meaningful in a fresh process."""
    step = make_step(side, make_batch(*SHAPES[MEMORY_SHAPE]))
    step()

    def resident_peak(trim: bool) -> float:
        gc.collect()
        if trim:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak is what there is now
        base = resident("VmRSS")
        step()
        return (resident("VmHWM") - base) / 1e6

    kept_heap = statistics.median([resident_peak(trim=False) for _ in range(5)])
    trimmed = max(resident_peak(trim=True) for _ in range(3))
    return {"tensors": allocated(step) / 1e6, "resident": trimmed, "kept heap": kept_heap}


def allocated(step: Callable[[], float]) -> int:
    """The most bytes that torch had allocated in a step and not freed."""
    with torch.profiler.profile(profile_memory=True) as profile:
        step()
    now = most = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda each: each.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def measure_memory(side: str, options: list[str]) -> dict[str, float]:
    arguments = [sys.executable, __file__, "--memory-of", side, *options]
    done = subprocess.run(arguments, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def ratios(times: dict[str, list[float]]) -> dict[str, float]:
    middle = {side: statistics.median(values) for side, values in times.items()}
    others = min(middle[side] for side in ["logits", *LIGER])
    return {
        "trl / separate": middle["trl"] / middle["separate"],
        "trl / shared": middle["trl"] / middle["shared"],
        "trl / packed": middle["trl"] / middle["packed"],
        "trl / auto": middle["trl"] / middle["auto"],
        "trl / cached": middle["trl"] / middle["cached"],
        "fastest other way / shared": others / middle["shared"],
        "packed / shared": middle["packed"] / middle["shared"],
        "auto / better of separate and shared": middle["auto"]
        / min(middle["separate"], middle["shared"]),
    }


def make_tiny() -> None:
    """Everything so small that a repeat takes a second."""
    global V, D, INNER, HEADS
    V, D, INNER, HEADS = 64, 16, 32, 2
    SHAPES.update(dict.fromkeys(SHAPES, (2, (8, 12), (4, 8))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--no-times", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="a model of no size")
    parser.add_argument("--shape", choices=list(SHAPES), help="this one alone")
    parser.add_argument("--memory-of", choices=SIDES, help="of this side alone, in this process")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    if arguments.tiny:
        make_tiny()
    if arguments.memory_of:
        print(json.dumps(measure_memory_here(arguments.memory_of)))
        return

    print(f"command: python {' '.join(sys.argv)}")
    names = ["torch", "transformers", "trl", "lightning", *["liger-kernel"] * len(LIGER)]
    told = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    print(f"{told}, python {platform.python_version()}")
    print(f"hardware: {hardware()}; load {os.getloadavg()[0]:.1f}; {time.strftime('%F')}")
    kind = f"V={V}, D={D}, 4 blocks, fp32, {arguments.repeats} alternated repeats"
    print(f"{kind}: median [min, max]\n", flush=True)
    for shape, (pairs, prompts, completions) in SHAPES.items():
        if arguments.no_times or arguments.shape not in (None, shape):
            continue
        print(f"{shape}: {pairs} pairs, prompts {prompts}, completions {completions}", flush=True)
        times, apart = measure_time(shape, arguments.repeats)
        for side in TIMED:
            print(f"  {side:10} {spread(times[side], 's CPU')}")
        for name, ratio in ratios(times).items():
            print(f"  {name}: {ratio:.2f}x")
        print(f"  first losses differ by {apart:.1e}\n", flush=True)
    if not arguments.no_memory and arguments.shape in (None, MEMORY_SHAPE):
        print(f"memory above base, {MEMORY_SHAPE}", flush=True)
        options = ["--tiny"] * arguments.tiny
        memory = {side: measure_memory(side, options) for side in SIDES}
        for side, found in memory.items():
            told = (f"{n} {mb:.0f} MB, {mb / memory['trl'][n]:.3f}x" for n, mb in found.items())
            print(f"  {side:10} {'; '.join(told)}", flush=True)


if __name__ == "__main__":
    main()
