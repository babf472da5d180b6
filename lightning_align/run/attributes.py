"""Attributes that a run changes, as plain data in its checkpoint.

A LightningModule counts, collects and averages in attributes that are neither parameters nor
buffers, and Lightning saves none of them. What training has changed since it began goes into the
checkpoint, with a mark of how it began: a module that begins otherwise today was given another
argument by its user, and that wins. What tensors begin with does not count: it comes of weights.
Attributes of submodules count as well; metrics do elsewhere (epoch_means.py), and whoever has a
``state_dict`` of its own is asked for it.

What can neither be written down nor built anew, an open file or a generator, is named in a warning.
"""

import enum
import functools
import hashlib
import operator
import pickle
import random
import types
from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
import xxhash
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_align._compat import lightning_resume
from lightning_align._errors import argument_error
from lightning_align.run.callbacks import callbacks_of
from lightning_align.run.plain import Encoder, LostError, Rebuilder, UnknownTypeError
from lightning_align.run.protocols import datamodule_of, frozen_modules
from lightning_align.run.replicas import of_every_rank, replica

_ABSENT = ("absent",)  # what an attribute is that is not there
_FILLED = (list, dict, set, deque, np.ndarray, torch.Tensor, torch.Generator, random.Random)


class Mark(NamedTuple):
    """What tells a value from others: digests with and without what is in its tensors."""

    exact: str
    outline: str


Marks = dict[str, Mark]
Plain = dict[str, Any]  # name -> what an attribute is now, as plain data
Changed = dict[str, tuple[list[str], Any]]  # name -> outlines of how it began, and what it is now


class Attributes:
    """The attributes of a module in one fit.

    Args:
        trainer: Who fits it; its optimizers and schedulers are in the checkpoint already.
        module: Whose attributes they are; those of its submodules count as well.

    Attributes:
        start: How each attribute was as training began, behind all hooks of the start.
    """

    def __init__(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.start: Marks = {}
        self._trainer, self._module = trainer, module
        self._built = _marks(self._encoded()[0])  # before any hook of the start
        self._begun = False
        self._opaque: dict[str, bytes | None] = {}  # how what cannot be saved was as it began
        self._before_sanity_check: Marks = {}
        self._after_sanity_check: Marks = {}
        self._named: set[str] = set()  # what was warned of

    def note_sanity_check(self, *, begins: bool) -> None:
        """A resumed run has no sanity check: what it changes is no part of how a run begins."""
        marks = _marks(self._encoded()[0])
        if begins:
            self._before_sanity_check = marks
        else:
            self._after_sanity_check = marks

    def begin(self) -> None:
        """Note how training begins."""
        self._begun = True
        encoded, encoder = self._encoded()
        self.start, self._opaque = _marks(encoded), _opaque_now(encoder)
        for name, after in self._after_sanity_check.items():
            before = self._before_sanity_check.get(name, _mark(_ABSENT))
            if before != after == self.start.get(name):
                self.start[name] = before

    def changed(self) -> list[Changed]:
        """What each rank has changed since training began, as plain data.

        Collective: every rank must call it. What is the same on all ranks is one object.
        """
        if not self._begun:
            return []
        encoded, encoder = self._encoded()
        self._name_what_is_lost(encoder)
        now, absent = _marks(encoded), _mark(_ABSENT)
        changed = {
            name: (self._outlines(name), encoded.get(name, _ABSENT))
            for name in now.keys() | self.start.keys()
            if now.get(name, absent) != self.start.get(name, absent)
            and not _is_lost(encoded.get(name))
        }
        if self._trainer.world_size == 1:
            return [changed]
        # Rank zero's are Lightning's; replicas of BatchNorm have statistics of their own.
        buffers = dict(_buffers(self._module, persistent=True))
        if replica(self._trainer)[0] == 1:
            buffers.clear()
        plain = {name: encoder.plain_tensor(value) for name, value in buffers.items()}
        changed |= {name: (self._outlines(name), value) for name, value in plain.items()}
        return _of_every_rank(self._trainer, changed, now | _marks(plain), unless_same=set(plain))

    def now(self) -> Plain:
        """All of this rank's attributes, for ``replace`` in the same fit."""
        encoded, encoder = self._encoded()
        self._name_what_is_lost(encoder)
        return encoded

    def replace(self, saved: Plain) -> None:
        """Let this rank's attributes be what they were in this fit, and no others be there.

        Args:
            saved: From ``now``.
        """
        encoded, encoder = self._encoded()
        rebuilder = Rebuilder(encoder, type(self._module), self._module.device)
        absent = [name for name in encoded if name not in saved]
        for name in (*saved, *absent):  # in this order, since later ones refer to earlier ones
            value = saved.get(name, _ABSENT)
            if not _is_lost(value):
                self._set(name, value, rebuilder)

    def _outlines(self, name: str) -> list[str]:
        """How an attribute was when the fit and when training began."""
        absent = _mark(_ABSENT)
        return [marks.get(name, absent).outline for marks in (self._built, self.start)]

    def restore(self, saved: list[Changed]) -> None:
        """Put this rank's attributes back, where they begin today as they began then.

        Raises:
            ValueError: If one is of a class that is not there today.
        """
        if not saved:
            return
        ours = saved[min(self._trainer.global_rank, len(saved) - 1)]
        if len(saved) != self._trainer.world_size:
            ours = _common(saved, self._trainer.world_size)
        encoded, encoder = self._encoded()
        rebuilder = Rebuilder(encoder, type(self._module), self._module.device)
        today, kept = _marks(encoded), []
        for name in sorted(ours):
            began, value = ours[name]
            # A hook of the start may make it of weights, which on a resume are those of the save.
            if any(map(operator.eq, began, self._outlines(name))):
                self._set(name, value, rebuilder)
            elif today.get(name, _mark(_ABSENT)) != _mark(value):
                kept.append(name)
        if kept:
            rank_zero_warn(
                f"ExactResume: {kept} of {type(self._module).__name__} begin otherwise than in the"
                " run that wrote the checkpoint, and stay as they are now."
            )

    def _set(self, name: str, value: Any, rebuilder: Rebuilder) -> None:
        path, _, attribute = name.rpartition(".")
        owner = dict(self._module.named_modules()).get(path)
        if owner is None:
            return  # a submodule of that run only; Lightning has compared the parameters
        if attribute in owner._buffers:
            if value[0] == "tensor":
                self._fill(owner._buffers[attribute], value[1])
            return
        if value == _ABSENT:
            owner.__dict__.pop(attribute, None)
            return
        try:
            today = {**_of_class(type(owner)), **owner.__dict__}.get(attribute)
            built = rebuilder.build(today, value, name)
            if built is not today:
                owner.__dict__[attribute] = built
        except LostError as error:
            rank_zero_warn(f"ExactResume: {name} begins anew: {error} could not be saved in it.")
        except UnknownTypeError as error:
            rule = f"the checkpoint holds {error} in it, of which this process knows no example"
            way_out = "Import it, make it a dataclass, or keep it in on_save_checkpoint and"
            way_out += " on_load_checkpoint"
            where = type(self._module).__name__
            raise argument_error(where, name, "checkpoint", rule, way_out) from None

    def _fill(self, buffer: Any, value: torch.Tensor) -> None:
        if buffer.shape == value.shape:
            buffer.data.copy_(value)  # DDP holds the tensor itself
        else:
            buffer.data = value.to(self._module.device, copy=True)

    def _encoded(self) -> tuple[dict[str, Any], Encoder]:
        encoder = Encoder(_elsewhere(self._trainer, self._module))
        encoded = {name: encoder.encode(value, name) for name, value in _attributes(self._module)}
        for name, value in _buffers(self._module, persistent=False):
            encoded[name] = encoder.plain_tensor(value)
        return encoded, encoder

    def _name_what_is_lost(self, encoder: Encoder) -> None:
        now, known = _opaque_now(encoder), self._opaque
        changed = {n for n, state in now.items() if state is None or known.get(n) != state}
        if lost := sorted(changed - self._named):
            self._named |= changed
            rank_zero_warn(
                f"ExactResume: {lost} of {type(self._module).__name__} cannot be written into a"
                " checkpoint; a resumed run has them as it begins. If they decide anything, keep"
                " what matters in plain attributes, or in on_save_checkpoint."
            )


def _attributes(module: pl.LightningModule) -> Iterator[tuple[str, Any]]:
    """Names and values of all attributes that are neither Lightning's nor torch's own."""
    for path, submodule in module.named_modules():
        known = lightning_resume.own_attributes(submodule)
        for name, value in {**_of_class(type(submodule)), **vars(submodule)}.items():
            if name not in known and not _is_method(type(submodule), name, value):
                yield (f"{path}.{name}" if path else name), value


def _is_method(kind: type, name: str, value: Any) -> bool:
    """Whether code stands in the place of a method for a while: it is whoever put it there's."""
    is_code = isinstance(value, (types.FunctionType, types.MethodType, functools.partial))
    return is_code and callable(getattr(kind, name, None))


def _buffers(module: pl.LightningModule, *, persistent: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """Buffers that are in the ``state_dict``, or those that are not."""
    for path, submodule in module.named_modules():
        for name, value in submodule._buffers.items():
            plain = type(value) is torch.Tensor and value.layout == torch.strided
            if plain and (name not in submodule._non_persistent_buffers_set) is persistent:
                yield (f"{path}.{name}" if path else name), value


def _of_class(kind: type) -> dict[str, Any]:
    """What a class holds that its instances may fill: ``losses = []`` in its body."""
    shared: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        if base.__module__.partition(".")[0] not in ("builtins", "torch", "lightning", "typing"):
            shared |= {n: v for n, v in vars(base).items() if not n.startswith("__")}
    return {name: value for name, value in shared.items() if isinstance(value, _FILLED)}


def _elsewhere(trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, Any]:
    """What is saved or built by others: a link to it is enough."""
    configs = trainer.lr_scheduler_configs
    lists = {
        "callback": callbacks_of(trainer),
        "logger": trainer.loggers,
        "optimizer": trainer.optimizers,
        "wrapped optimizer": lightning_resume.lightning_optimizers(trainer),
        "scheduler config": configs,
        "scheduler": [config.scheduler for config in configs],
        "loader": getattr(lightning_resume.train_loaders(trainer), "flattened", []),
    }
    links: dict[str, Any] = {"trainer": trainer, "strategy": trainer.strategy}
    loop = trainer.fit_loop
    for name, whole in (*links.items(), ("loop", loop), ("epoch loop", loop.epoch_loop)):
        parts = {part: item for part, item in vars(whole).items() if _is_lightnings(item)}
        links |= {f"{name}: {part}": item for part, item in parts.items()}
    links |= {f"{kind} {n}": item for kind, items in lists.items() for n, item in enumerate(items)}
    if (datamodule := datamodule_of(trainer)) is not None:
        links["datamodule"] = datamodule
    for root, owner in {"": module, **frozen_modules(module)}.items():
        for items in (owner.named_modules(), owner.named_parameters(), owner.named_buffers()):
            links |= {f"{root}:{name}": item for name, item in items}
    return links


def _is_lightnings(value: Any) -> bool:
    """Whether it is part of how Lightning works, and not of what it works on."""
    of_the_user = isinstance(value, (nn.Module, dict, enum.Enum))
    return type(value).__module__.startswith("lightning.") and not of_the_user


def _marks(encoded: dict[str, Any]) -> Marks:
    return {name: _mark(value) for name, value in encoded.items()}


def _mark(encoded: Any) -> Mark:
    exact, outline = xxhash.xxh3_128(), hashlib.blake2b(digest_size=16)  # all tensors go by xxh3
    for part in _parts(encoded):
        if isinstance(part, torch.Tensor):
            kind = f"{part.dtype}{tuple(part.shape)}".encode()
            exact.update(kind)
            outline.update(kind)
            flat = part.detach().cpu().contiguous().flatten()
            exact.update(flat.view(torch.uint8).numpy().data)
        else:
            exact.update(part)
            outline.update(part)
    return Mark(exact.hexdigest(), outline.hexdigest())


def _parts(encoded: Any) -> Iterator[Any]:
    """The tensors of plain data, and the bytes of all else."""
    if isinstance(encoded, torch.Tensor):
        yield encoded
    elif isinstance(encoded, (list, tuple)):
        yield f"{type(encoded).__name__}{len(encoded)}(".encode()
        for item in encoded:
            yield from _parts(item)
    else:
        yield f"{encoded!r},".encode()


def _is_lost(encoded: Any) -> bool:
    return isinstance(encoded, tuple) and encoded[0] in ("constant", "opaque")


def _opaque_now(encoder: Encoder) -> dict[str, bytes | None]:
    """Digest of each object that cannot be saved, or None where not even that is possible."""
    return {path: _pickled(value) for path, value in encoder.opaque.items()}


def _pickled(value: Any) -> bytes | None:
    try:
        pickled = pickle.dumps(value)
    except Exception:
        return None
    return hashlib.blake2b(pickled, digest_size=16).digest()


def _of_every_rank(
    trainer: pl.Trainer, changed: Changed, now: Marks, *, unless_same: set[str]
) -> list[Changed]:
    """Values of all ranks; only those that differ are sent, and some are left out otherwise."""
    absent = _mark(_ABSENT)
    mine = {name: (began, *now.get(name, absent)) for name, (began, _) in changed.items()}
    marks = of_every_rank(trainer, mine)
    same = {name for name in mine if all(other.get(name) == mine[name] for other in marks)}
    others: list[Any] = [{}] * len(marks)
    if any(other.keys() != same for other in marks):
        own = {name: value for name, value in changed.items() if name not in same}
        others = of_every_rank(trainer, own)
    shared = {name: changed[name] for name in sorted(same - unless_same)}
    return [{**shared, **own} for own in others]


def _common(saved: list[Changed], world_size: int) -> Changed:
    """What was the same on all ranks; the rest belongs to ranks that are no more."""
    marks = [{name: _mark(value) for name, value in rank.items()} for rank in saved]
    same = {name for name, mark in marks[0].items() if all(m.get(name) == mark for m in marks)}
    if different := sorted({name for rank in saved for name in rank} - same):
        rank_zero_warn(
            f"ExactResume: the checkpoint was written by {len(saved)} rank(s), and is resumed by"
            f" {world_size}: {different} had another value on each, and begin anew."
        )
    return {name: saved[0][name] for name in same}
