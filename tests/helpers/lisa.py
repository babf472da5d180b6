"""What the tests of LISA train on, and what they look at."""

import copy
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.distributed import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader
from transformers import Qwen3Config

from lightning_align import LISA, GaLoreAdamW, Muon, PretrainModule, StableAdamW
from lightning_align.callbacks.lisa import held_bytes
from tests.helpers.resume import VOCABULARY
from tests.modules.test_pretrain import LLAMA, fit, gpt2, llama, rows, weights

BLOCKS = 4


BATCHES = [rows(i, i + 1) for i in range(12)]


ADAMW = partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1)


OPTIMIZERS = {
    "AdamW fused": partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1, fused=True),
    "AdamW foreach": partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1, foreach=True),
    "SGD momentum": partial(torch.optim.SGD, lr=1e-2, momentum=0.9, weight_decay=0.1),
    "Muon": partial(Muon, lr=1e-2),
    "GaLoreAdamW": partial(GaLoreAdamW, lr=1e-2, rank=2, update_proj_gap=2),
    "StableAdamW": partial(StableAdamW, lr=1e-2, weight_decay=0.1),
}


class Layered(pl.LightningModule):
    """Written by hand, knows nothing of us, and has four blocks."""

    def __init__(
        self, optimizer: Any = ADAMW, blocks: int = BLOCKS, vocabulary: int = VOCABULARY
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, 16)
        self.blocks = nn.Sequential(
            *(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(blocks))
        )
        self.head = nn.Linear(16, vocabulary)
        self.optimizer = optimizer

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        logits = self.head(self.blocks(self.embedding(batch["input_ids"][:, :-1])))
        return F.cross_entropy(logits.flatten(0, 1), batch["input_ids"][:, 1:].flatten())

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.parameters())


CONFIGS = {
    "llama": llama(num_hidden_layers=BLOCKS),
    "gpt2": gpt2(),
    "qwen3": Qwen3Config(
        **{**LLAMA, "num_hidden_layers": BLOCKS}, num_key_value_heads=2, head_dim=8
    ),
}


CONFIGS["gpt2"].n_layer = BLOCKS


MODELS = [*CONFIGS, "hand-written"]


def build(name: str, optimizer: Any = ADAMW, **options: Any) -> Any:
    pl.seed_everything(1, verbose=False)
    if name == "hand-written":
        return Layered(optimizer)
    return PretrainModule(CONFIGS[name], optimizer=optimizer, **options)


def blocks_of(module: Any) -> list[nn.Module]:
    return list(module.blocks) if isinstance(module, Layered) else module.layers.blocks


def names_of_blocks(module: Any) -> list[set[str]]:
    names = {parameter: name for name, parameter in module.named_parameters()}
    return [{names[p] for p in block.parameters()} for block in blocks_of(module)]


def train(module: pl.LightningModule, callback: LISA | None, *more: Any, **options: Any) -> Any:
    """Fit on ``BATCHES``, one after the other; draws only into a ``folder`` that is given."""
    folder = options.pop("folder", None)
    batches = options.pop("batches", BATCHES)
    if callback is not None and folder is None:
        callback.filename = None
    callbacks = [*filter(None, [callback]), *more]
    return fit(module, batches, callbacks=callbacks, default_root_dir=folder, **options)


class Watch(pl.Callback):
    """Keeps all weights at the beginning of every batch and at the end, and what was active."""

    def __init__(self, callback: LISA) -> None:
        self.lisa = callback
        self.weights: list[dict[str, torch.Tensor]] = []
        self.active: list[tuple[int, ...]] = []
        self.gradients_in_forward: list[int] = []
        self.states: list[set[str]] = []
        self.optimizer_bytes: list[int] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.weights.append(copy.deepcopy(dict(pl_module.named_parameters())))
        self.active.append(self.lisa.active_layers)
        self.gradients_in_forward.append(sum(p.grad is not None for p in pl_module.parameters()))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        state = trainer.optimizers[0].state
        self.states.append({n for n, p in pl_module.named_parameters() if state.get(p)})
        self.optimizer_bytes.append(held_bytes(pl_module, trainer.optimizers[0])["optimizer_bytes"])

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.weights.append(copy.deepcopy(dict(pl_module.named_parameters())))


def watched(module: Any, callback: LISA, **options: Any) -> Watch:
    watch = Watch(callback)
    train(module, callback, watch, **options)
    return watch


class SaveAt(pl.Callback):
    """Saves after a batch."""

    def __init__(self, batch: int, path: Path) -> None:
        self.batch, self.path = batch, path

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == self.batch:
            trainer.save_checkpoint(self.path)


def check_moves(name: str, accumulate: int) -> None:
    """Every active block has moved at every step, and every frozen one is bit-equal."""
    module, callback = build(name), LISA(2, interval_steps=2)
    watch = watched(module, callback, accumulate_grad_batches=accumulate)
    names = names_of_blocks(module)
    assert len(set(watch.active)) > 1
    for batch, (before, after) in enumerate(pairwise(watch.weights)):
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        if (batch + 1) % accumulate:
            assert not moved
            continue
        active = watch.active[batch]
        assert all(bool(moved & names[block]) is (block in active) for block in range(BLOCKS))
        frozen = [names[block] for block in range(BLOCKS) if block not in active]
        assert not moved & set().union(*frozen)
        weights_of_active = {n for block in active for n in names[block] if n.endswith("weight")}
        assert weights_of_active <= moved
        outside = before.keys() - set().union(*names)
        assert {name for name in outside if name.endswith("weight")} <= moved


def lmflow_replay(
    module: Any, schedule: list[tuple[int, ...]], *, drop: bool, accumulate: int = 1
) -> None:
    """LMFlow's DynamicLayerActivationCallback, written anew as a plain loop.

    All parameters are the optimizer's from the beginning; a new set of blocks is taken at the
    beginning of a step; a frozen block has no gradient, so AdamW leaves it alone, decay included.
    """
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, weight_decay=0.1)
    blocks = blocks_of(module)
    module.train()
    for step, active in enumerate(schedule):
        for number, block in enumerate(blocks):
            block.requires_grad_(number in active)
        optimizer.zero_grad(set_to_none=True)
        if drop:
            for parameter in module.parameters():
                if not parameter.requires_grad:
                    optimizer.state.pop(parameter, None)
        total = 0
        for batch in BATCHES[step * accumulate : (step + 1) * accumulate]:
            loss = module.training_step(batch, 0)
            (loss / accumulate).backward()
            total += int((batch["labels"][:, 1:] != -100).sum())
        if isinstance(module, PretrainModule):  # its loss is a sum over the tokens of the window
            gradients = [p.grad for p in module.parameters() if p.grad is not None]
            torch._foreach_mul_(gradients, accumulate / torch.tensor(float(total)))
        optimizer.step()


def in_one_group(parameters: Any) -> Any:
    """AdamW that decays all parameters alike, whatever groups it is given."""
    given = list(parameters)
    if isinstance(given[0], dict):
        given = [parameter for group in given for _, parameter in group["params"]]
    return ADAMW(given)


def check_replay(name: str, state: str, accumulate: int) -> None:
    """The weights are those of LMFlow's semantics, bit for bit."""
    ours, theirs = build(name, in_one_group), build(name)
    callback = LISA(2, interval_steps=2, optimizer_state=state)
    watch = watched(ours, callback, accumulate_grad_batches=accumulate)
    lmflow_replay(theirs, watch.active[::accumulate], drop=state == "drop", accumulate=accumulate)
    assert torch.equal(weights(ours), weights(theirs))


def check_frozen_part(part: str, name: str) -> None:
    """Embedding or head stay as they are, and all else outside of the blocks trains."""
    if name == "gpt2":
        pl.seed_everything(1, verbose=False)
        config = copy.deepcopy(CONFIGS["gpt2"])
        config.tie_word_embeddings = False
        module: Any = PretrainModule(config, optimizer=ADAMW)
    else:
        module = build(name)
    before = copy.deepcopy(dict(module.named_parameters()))
    train(module, LISA(2, 2, **{part: False}))
    heads = ("head", "lm_head", "norm", "ln_f")
    blocks = set().union(*names_of_blocks(module))
    outside = [name for name in before if name not in blocks]
    assert len(outside) >= 2
    for parameter_name in outside:
        is_head = any(f".{part}." in f".{parameter_name}" for part in heads)
        stays = torch.equal(before[parameter_name], module.get_parameter(parameter_name))
        assert stays is (is_head if part == "train_head" else not is_head), parameter_name


class Traffic(pl.Callback):
    """Counts the bytes of gradients that DDP sends in each step of a rank, into a file."""

    def __init__(self, folder: Path, callback: LISA) -> None:
        self.folder, self.lisa = folder, callback
        self.sent = 0
        self.model: Any = None

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.strategy.model is not self.model:
            self.model = trainer.strategy.model
            self.model.register_comm_hook(None, self.count)
        self.sent = 0

    def count(self, state: Any, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
        self.sent += bucket.buffer().nbytes
        return allreduce_hook(None, bucket)  # type: ignore[arg-type]

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        # Before LISA frees them
        held = sum(p.grad.nbytes for p in pl_module.parameters() if p.grad is not None)
        with (self.folder / f"sent.{trainer.global_rank}").open("a") as file:
            file.write(f"{self.sent} {held} {self.lisa.active_layers}\n")


class Halves(pl.LightningDataModule):
    """16 batches in the given order, one after the other to each rank in turn, or two at a time."""

    def train_dataloader(self) -> Any:
        rank, ranks = self.trainer.global_rank, self.trainer.world_size  # type: ignore[union-attr]
        halves = [rows(i, i + 1) for i in range(16)]
        if ranks == 2:
            return DataLoader(halves[rank::2], batch_size=None)  # type: ignore[arg-type]
        wholes = [
            {key: torch.cat([first[key], second[key]]) for key in first}
            for first, second in zip(halves[::2], halves[1::2], strict=True)
        ]
        return DataLoader(wholes, batch_size=None)  # type: ignore[arg-type]


def fit_halves(module: Any, callbacks: list[pl.Callback], **options: Any) -> None:
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=callbacks,
        gradient_clip_val=0.5,
        **options,
    )
    trainer.fit(module, Halves())


def check_two_ranks(name: str, accumulate: int, folder: Path) -> None:
    """Two ranks equal one process, and send the gradients of active blocks only."""
    sgd = partial(torch.optim.SGD, lr=0.2, momentum=0.9)
    one, two = build(name, sgd), build(name, sgd)
    arguments: dict[str, Any] = {"interval_steps": 2, "sampling": "weight_norm", "filename": None}
    fit_halves(one, [LISA(2, **arguments)], accumulate_grad_batches=accumulate)
    callback = LISA(2, **arguments)
    fit_halves(
        two,
        [callback, Traffic(folder, callback)],
        strategy="ddp_fork",
        devices=2,
        accumulate_grad_batches=accumulate,
    )
    # fp32 sums over the rows of two ranks are taken in another order; eight steps with momentum.
    torch.testing.assert_close(weights(two), weights(one), rtol=0, atol=2e-6)
    lines = [(folder / f"sent.{rank}").read_text().splitlines() for rank in range(2)]
    assert lines[0] == lines[1]
    assert len(lines[0]) == 8 // accumulate
    everything = sum(parameter.nbytes for parameter in two.parameters())
    for line in lines[0]:
        sent, held, _ = line.split(" ", 2)
        assert int(sent) == int(held) < everything
    assert len({line.split(" ", 2)[2] for line in lines[0]}) > 1
