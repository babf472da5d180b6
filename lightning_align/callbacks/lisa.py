"""Layerwise importance sampled AdamW (LISA): full fine-tuning of a few blocks at a time.

Freezing by ``requires_grad`` alone returns little: the gradient of a frozen weight stays until the
next ``zero_grad``, which Lightning calls after the next forward, and its moments stay for ever, so
that after some intervals the optimizer is as large as that of full fine-tuning. Here gradients go
when a step is done, and the optimizer's state when a block is frozen.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_align._compat import lightning_trainer
from lightning_align._declared import declared
from lightning_align._errors import argument_error, check_least, finite_number
from lightning_align.callbacks.lisa_layers import (
    Partition,
    draw_blocks,
    language_model,
    num_bytes,
    partition,
    weight_norms,
)
from lightning_align.callbacks.lisa_picture import draw_history
from lightning_align.figure import new_figure
from lightning_align.layers import ModelLayers
from lightning_align.reports.pictures import log_figure
from lightning_align.run.position import batches_consumed
from lightning_align.run.protocols import follow_freezing, gathered, may_freeze


@declared
class LISA(Callback):
    """Train embedding, head and a few randomly drawn blocks at a time (arXiv:2403.17919).

    Every ``interval_steps`` optimizer steps other blocks are drawn and all others frozen: they need
    no gradients, no optimizer state and no saved inputs of their linear layers. The draw is a
    function of (seed, interval), the same on all ranks and after a resume. Logs the active blocks
    and the bytes held as ``lisa/...``, and draws which blocks trained when at the end.

    Args:
        activated_layers: Blocks that train in an interval.
        interval_steps: Optimizer steps between draws.
        layers_attribute: Dotted name of the list of blocks, from the language model or from the
            LightningModule, if it is not found.
        sampling: uniform, weight_norm (in proportion to the norm of a block's weights), or a list
            with a weight for each block.
        optimizer_state: What becomes of the moments of a block that is frozen: drop or keep, which
            needs as much memory as full fine-tuning in the end.
        train_embeddings: Whether the token embedding trains, with all else that is in no block.
        train_head: Whether head and final norm train.
        reactivation_warmup_steps: Steps over which the updates of a block that comes back grow
            from a fraction to their full size.
        seed: Seed of the draws of blocks, apart from that of the run.
        filename: PNG to write in the folder of the run; None draws nothing.

    Attributes:
        active_layers: Numbers of the blocks that train now.

    Raises:
        ValueError: If an argument is out of its range, or before training, if the model, its
            optimizer or the strategy cannot follow.

    Example:
        >>> callback = LISA(activated_layers=2, interval_steps=20)

    Note: works in one process, under DDP and ModelParallelStrategy. The optimizer must know all
    blocks; freeze none of them yourself. Gradients are gone in your own ``on_train_batch_end``.
    """

    def __init__(
        self,
        activated_layers: int = 2,
        interval_steps: int = 20,
        layers_attribute: str | None = None,
        sampling: list[float] | str = "uniform",
        optimizer_state: Literal["drop", "keep"] = "drop",
        train_embeddings: bool = True,
        train_head: bool = True,
        reactivation_warmup_steps: int = 0,
        seed: int = 0,
        filename: str | None = "lisa.png",
    ) -> None:
        check_least("LISA", 1, activated_layers=activated_layers, interval_steps=interval_steps)
        if not isinstance(sampling, str):
            sampling = list(sampling)
        _check_sampling(sampling, activated_layers)
        if optimizer_state not in ("drop", "keep"):
            rule = "must be 'drop' or 'keep'"
            raise argument_error("LISA", "optimizer_state", optimizer_state, rule)
        if not 0 <= reactivation_warmup_steps < interval_steps:
            rule = (
                f"must lie in [0, interval_steps={interval_steps}): no block would ever train fully"
            )
            steps = reactivation_warmup_steps
            raise argument_error("LISA", "reactivation_warmup_steps", steps, rule)
        if seed < 0:
            raise argument_error("LISA", "seed", seed, "must not be negative")
        if filename is not None and not filename.endswith(".png"):
            raise argument_error("LISA", "filename", filename, "must end in '.png'")
        self.activated_layers = activated_layers
        self.interval_steps = interval_steps
        self.layers_attribute = layers_attribute
        self.sampling = sampling
        self.optimizer_state = optimizer_state
        self.train_embeddings = train_embeddings
        self.train_head = train_head
        self.reactivation_warmup_steps = reactivation_warmup_steps
        self.seed = seed
        self.filename = filename
        # (first step, blocks) of every draw so far: the last is in force, all are in the picture.
        self.history: list[tuple[int, tuple[int, ...]]] = []
        self._layers: ModelLayers | None = None
        self._parameters: Partition | None = None
        self._drawn_at: int | None = None  # number of the batch before which the last draw was
        self._in_force: tuple[int, ...] | None = None  # what requires_grad says
        self._held: dict[str, Tensor] = {}  # what is logged, anew with each draw
        self._unramped: list[tuple[nn.Parameter, Tensor]] = []  # weights before a step
        self._hook: RemovableHandle | None = None
        self._gathered: Callable[..., AbstractContextManager[None]] = _here
        self._saved_settings: dict[str, Any] | None = None

    @property
    def active_layers(self) -> tuple[int, ...]:
        """Numbers of the blocks that train now, ascending."""
        return self.history[-1][1] if self.history else ()

    def schedule(self, step: int) -> tuple[int, ...]:
        """Numbers of the blocks that train at an optimizer step, ascending; from ``setup`` on.

        A function of (seed, interval); with ``sampling="weight_norm"`` also of the weights as they
        are now.

        Raises:
            ValueError: If the model is not known yet.
        """
        if self._layers is None:
            rule = "the number of blocks is not known yet"
            raise argument_error("LISA.schedule", "step", step, rule, "Ask from setup on")
        if isinstance(self.sampling, list):
            weights = self.sampling
        elif self.sampling == "weight_norm":
            weights = self._norms(self._layers)
        else:
            weights = [1.0] * len(self._layers.blocks)
        return draw_blocks(self.seed, step // self.interval_steps, self.activated_layers, weights)

    def planned_change(self, position: int) -> str | None:
        """That other blocks train from a batch on: their gradients have another norm."""
        switched = position == self._drawn_at and len(self.history) > 1
        return f"LISA trains blocks {list(self.active_layers)}" if switched else None

    # Before training

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        _check_strategy(trainer.strategy)
        self._gathered = partial(gathered, trainer.strategy)
        if not pl_module.automatic_optimization:
            rule = "it optimizes manually, and blocks are switched between Lightning's own steps"
            way_out = "Set automatic_optimization = True, or leave LISA out"
            raise argument_error("LISA", "model", type(pl_module).__name__, rule, way_out)
        self._layers = language_model(pl_module, self.layers_attribute)
        self._check_blocks(self._layers)
        self._in_force = None
        if trainer.global_step == 0:  # a new run; a resumed one loads its state after setup
            self.history, self._saved_settings, self._drawn_at = [], None, None
        try:
            if self.filename is not None:
                new_figure(1, 1)
        except ImportError as error:
            self.filename = None
            rank_zero_warn(f"LISA draws no picture at the end of the run. {error}")

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._layers is not None
        self._check_continuity()
        ends = {"train_embeddings": self.train_embeddings, "train_head": self.train_head}
        self._parameters = partition(pl_module, self._layers, **ends)
        optimizer = trainer.optimizers[0]
        _check_optimizer(pl_module, optimizer, self._parameters)
        if self.reactivation_warmup_steps:
            self._hook = optimizer.register_step_post_hook(lambda *_: self._ramp(trainer))

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check_continuity()  # there are strategies that load a checkpoint after on_fit_start

    def _check_blocks(self, layers: ModelLayers) -> None:
        count = len(layers.blocks)
        if self.activated_layers > count:
            rule = f"the model has {count} blocks in '{layers.blocks_name}'"
            way_out = "Lower it, or set layers_attribute"
            raise argument_error("LISA", "activated_layers", self.activated_layers, rule, way_out)
        if isinstance(self.sampling, list) and len(self.sampling) != count:
            rule = f"must have a weight for each of the {count} blocks in '{layers.blocks_name}'"
            raise argument_error("LISA", "sampling", self.sampling, rule)

    def _check_continuity(self) -> None:
        saved, self._saved_settings = self._saved_settings, None
        for argument, ours in self._settings().items():
            if saved is not None and saved[argument] != ours:
                rule = f"the checkpoint was written with {saved[argument]!r}"
                way_out = "Continue that run as it was, or start a new one from its weights"
                if argument == "layers_attribute":
                    rule = f"it leads to {ours} blocks, and to {saved[argument]} in the checkpoint"
                    ours = self.layers_attribute
                raise argument_error("LISA", argument, ours, rule, way_out)

    def _settings(self) -> dict[str, Any]:
        """What the draws follow from."""
        return {
            "seed": self.seed,
            "activated_layers": self.activated_layers,
            "interval_steps": self.interval_steps,
            "sampling": self.sampling,
            "layers_attribute": len(self._layers.blocks) if self._layers else 0,
        }

    # Steps

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        interval = step // self.interval_steps
        # Steps are counted when a window closes, so this is always the first batch of a window.
        if not self.history or self.history[-1][0] // self.interval_steps != interval:
            active = self.schedule(step)
            if self.sampling == "weight_norm":  # other machines may round norms in another way
                active = trainer.strategy.broadcast(active)
            self.history.append((step, active))
            self._drawn_at = batches_consumed(trainer)
        if self._in_force != self.active_layers:
            self._switch(trainer)

    def _switch(self, trainer: Trainer) -> None:
        """Let requires_grad, gradients, optimizer and strategy follow the draw in force."""
        assert self._parameters is not None
        for parameter in self._parameters.trained(self.active_layers):
            parameter.requires_grad_(True)
        frozen = self._parameters.frozen(self.active_layers)
        for parameter in frozen:
            parameter.requires_grad_(False)
            parameter.grad = None
        follow_freezing(trainer, frozen if self.optimizer_state == "drop" else ())
        self._in_force, self._held = self.active_layers, {}

    @override
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        assert self._parameters is not None
        for parameter in self._parameters.frozen(self.active_layers):
            parameter.grad = None  # left by other code; even one of zeros lets a weight decay
        if self._warmth(trainer.global_step) < 1:
            # Active blocks that were frozen before; in the first interval there are none.
            before = self.history[-2][1] if len(self.history) > 1 else self.active_layers
            returned = set(self.active_layers).difference(before)
            blocks = [self._parameters.blocks[block] for block in returned]
            parameters = set[nn.Parameter]().union(*blocks)
            with self._gathered(parameters):
                self._unramped = [(p, p.detach().clone()) for p in parameters]

    def _warmth(self, step: int) -> float:
        """Share of its update that a block gets that came back, at an optimizer step."""
        steps_done = step - self.history[-1][0]
        return min(1.0, (steps_done + 1) / (self.reactivation_warmup_steps + 1))

    @torch.no_grad()
    def _ramp(self, trainer: Trainer) -> None:
        """After a step, whatever the optimizer: take back a part of it, its decay included."""
        if not self._unramped:  # torch takes a step of zeros where it loads parts of a state
            return
        warmth = self._warmth(trainer.global_step)
        with self._gathered([parameter for parameter, _ in self._unramped], modify=True):
            for parameter, before in self._unramped:
                parameter.copy_(before.lerp_(parameter, warmth))
        self._unramped = []

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if lightning_trainer.is_accumulating(trainer):
            return
        self._unramped = []  # a scaler may have left out the step
        self._log(pl_module, trainer.optimizers[0])
        for parameter in pl_module.parameters():
            parameter.grad = None  # Lightning would keep it through the next forward

    def _log(self, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if not self._held:
            found = {**held_bytes(pl_module, optimizer)}
            found |= {f"active_{i}": block for i, block in enumerate(self.active_layers)}
            self._held = {
                f"lisa/{name}": torch.tensor(float(value), device=pl_module.device)
                for name, value in found.items()
            }
        for name, value in self._held.items():
            lightning_trainer.log_step_value(pl_module, name, value)

    # Afterwards

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        is_dry: bool = trainer.fast_dev_run  # type: ignore[attr-defined]
        if self.filename and self.history and trainer.is_global_zero and not is_dry:
            assert self._layers is not None
            always = {"head": self.train_head, "embedding": self.train_embeddings}
            shown = [name for name, trains in always.items() if trains]
            blocks = len(self._layers.blocks)
            figure = draw_history(self.history, blocks, trainer.global_step, shown)
            for place in log_figure(trainer, "lisa", figure, filename=self.filename):
                rank_zero_info(f"LISA: which blocks trained when: {place}")

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release()

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._release()

    def _release(self) -> None:
        """Leave the module as it came: what is fitted next may train all of it."""
        if self._parameters is not None:
            blocks = range(len(self._parameters.blocks))
            for parameter in self._parameters.trained(blocks) | self._parameters.never:
                parameter.requires_grad_(True)
        if self._hook is not None:
            self._hook.remove()
        self._parameters, self._hook, self._in_force, self._unramped = None, None, None, []
        self._gathered = _here  # no strategy outlives its run here

    @override
    def state_dict(self) -> dict[str, Any]:
        history = [[step, list(active)] for step, active in self.history]
        settings = self._saved_settings or self._settings()
        return {"settings": settings, "history": history, "drawn_at": self._drawn_at}

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.history = [(step, tuple(active)) for step, active in state_dict["history"]]
        self._drawn_at = state_dict.get("drawn_at")
        self._in_force = None  # in mid-fit, too: requires_grad may say another draw than the state
        # Compared when training starts: a checkpoint may be evaluated under any settings.
        self._saved_settings = dict(state_dict["settings"])

    def _norms(self, layers: ModelLayers) -> list[float]:
        """Norm of the weights of each block.

        Raises:
            ValueError: If one is not finite: the run is lost.
        """
        norms = []
        for block in layers.blocks:
            with self._gathered(list(block.parameters())):
                norms += weight_norms([block])
        for name, norm in zip(layers.block_names, norms, strict=True):
            if not norm < float("inf"):
                rule = f"the weights of '{name}' are not finite"
                way_out = "Go back to an earlier checkpoint, with a lower learning rate"
                raise argument_error("LISA", "sampling", self.sampling, rule, way_out)
        return norms


def held_bytes(pl_module: nn.Module, optimizer: Optimizer) -> dict[str, int]:
    """Bytes of weights, gradients and optimizer state that are held now."""
    parameters = list(pl_module.parameters())
    states = [  # other code may keep something that is no dict there
        value
        for state in optimizer.state.values()
        if isinstance(state, Mapping)
        for value in state.values()
    ]
    return {
        "weights_bytes": num_bytes(parameters),
        "gradients_bytes": num_bytes(p.grad for p in parameters if p.grad is not None),
        "optimizer_bytes": num_bytes(value for value in states if isinstance(value, Tensor)),
    }


def _here(*_: Any, **__: Any) -> AbstractContextManager[None]:
    """Around parameters that are in memory all the time."""
    return nullcontext()


def _check_sampling(sampling: Any, activated_layers: int) -> None:
    if not isinstance(sampling, list):
        if sampling not in ("uniform", "weight_norm"):
            rule = "must be 'uniform', 'weight_norm' or a list of weights"
            raise argument_error("LISA", "sampling", sampling, rule)
        return
    if any((number := finite_number(weight)) is None or number < 0 for weight in sampling):
        rule = "weights must be finite and not negative"
    elif not sum(sampling):
        rule = "the sum of the weights must be above 0"
    elif sum(weight > 0 for weight in sampling) < activated_layers:
        rule = f"at least activated_layers={activated_layers} weights must be above 0"
    else:
        return
    raise argument_error("LISA", "sampling", sampling, rule)


def _check_strategy(strategy: Any) -> None:
    """Refuse strategies that keep parameters or gradients where we do not reach them."""
    name = type(strategy).__name__
    way_out = "Train in one process, with strategy='ddp' or with ModelParallelStrategy()"
    if not may_freeze(strategy):
        rule = "it does not follow when other blocks are frozen and released"
        raise argument_error("LISA", "strategy", name, rule, way_out)
    if lightning_trainer.has_comm_state(strategy):
        rule = "the state of its communication hook belongs to one set of parameters"
        raise argument_error("LISA", "strategy", name, rule, "Leave ddp_comm_state out")


def _check_optimizer(pl_module: nn.Module, optimizer: Optimizer, parameters: Partition) -> None:
    """Refuse an optimizer that was made for a part of the parameters only."""
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    expected = parameters.trained(range(len(parameters.blocks)))
    missing = [
        name
        for name, parameter in pl_module.named_parameters()
        if parameter in expected and id(parameter) not in known
    ]
    if missing:
        rule = (
            f"its optimizer knows nothing of {len(missing)} parameter(s), first '{missing[0]}', "
            "which would never train"
        )
        way_out = "Give it all of them, frozen or not"
        raise argument_error("LISA", "model", type(pl_module).__name__, rule, way_out)
