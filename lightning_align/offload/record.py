"""The commit record: one small file that says which step is whole, and where its values are.

It is written beside its place, made durable, and renamed: at any moment the file is that of one
step. It checks itself, so that a damaged one is refused and not believed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash

from lightning_align.durable import sync_path
from lightning_align.offload.places import Place

FORMAT = 1
FILE = "committed"
BEFORE = "committed.before"
_NEW = "committed.new"
FILES = (FILE, BEFORE, _NEW)


@dataclass
class StatePlace:
    """Where the optimizer's tensors of one parameter lie in the file of its block."""

    offset: int
    capacity: int  # bytes that are theirs
    tensors: dict[str, Place]  # offsets from ``offset`` on

    @property
    def end(self) -> int:
        """Where the next one may begin."""
        return self.offset + self.capacity


@dataclass
class Record:
    """A committed step.

    Attributes:
        step: Optimizer steps that are part of the values.
        slots: Block -> which of its two files has them.
        states: Block -> parameter -> where its optimizer state is.
        layout: Digest of what the blocks are made of.
        payload: What else belongs to that step, as the caller gave it.
        ranks: How many ranks have committed it, each its own record.
        whole: Whether no parameter is cut between ranks.
        number: Of the commit, in a row that a run which goes back to an earlier step goes on with.
    """

    step: int
    slots: dict[str, int]
    states: dict[str, dict[str, StatePlace]]
    layout: str
    payload: bytes
    ranks: int = 1
    whole: bool = False
    number: int = 0

    def prepare(self, folder: Path) -> None:
        """Write the record beside its place; what it names must be durable."""
        body = {
            "format": FORMAT,
            "step": self.step,
            "slots": self.slots,
            "states": {
                block: {name: _listed(place) for name, place in places.items()}
                for block, places in self.states.items()
            },
            "layout": self.layout,
            "ranks": self.ranks,
            "whole": self.whole,
            "number": self.number,
            "payload": [len(self.payload), xxhash.xxh3_128_hexdigest(self.payload)],
        }
        head = json.dumps(body).encode()
        digest = xxhash.xxh3_128_hexdigest(head).encode()
        with (folder / _NEW).open("wb") as file:
            file.writelines([digest, b"\n", head, b"\n", self.payload])
            file.flush()
            os.fsync(file.fileno())

    def put_in_place(self, folder: Path, *, keeps_before: bool = False) -> None:
        """Let a record that was prepared be the one that counts.

        Args:
            folder: Where it is.
            keeps_before: Whether the one before is kept, for ranks that may not come to this one.
        """
        if keeps_before and (folder / FILE).exists():
            (folder / BEFORE).unlink(missing_ok=True)
            (folder / BEFORE).hardlink_to(folder / FILE)
        (folder / _NEW).replace(folder / FILE)
        sync_path(folder)


def read_record(folder: Path, name: str = FILE) -> Record | None:
    """The committed step of a folder; None if there is none.

    Args:
        folder: Of a store.
        name: ``FILE``, or ``BEFORE`` for the step that was committed before it.

    Raises:
        ValueError: If the record is damaged.
    """
    path = folder / name
    if not path.exists():
        return None
    digest, head, payload = [*path.read_bytes().split(b"\n", 2), b"", b""][:3]
    if xxhash.xxh3_128_hexdigest(head).encode() != digest:
        raise ValueError(f"{path} is damaged: its digest differs. No step can be read there.")
    body = json.loads(head)
    if body["format"] != FORMAT:
        raise ValueError(f"{path} is of format {body['format']}: a newer version wrote it.")
    if [len(payload), xxhash.xxh3_128_hexdigest(payload)] != body["payload"]:
        raise ValueError(f"{path} is damaged: what belongs to step {body['step']} is incomplete.")
    states = {
        block: {name: _place(listed) for name, listed in places.items()}
        for block, places in body["states"].items()
    }
    # Records of earlier versions have no number; no run of theirs went back on several ranks.
    of_ranks = body["ranks"], body["whole"], body.get("number", body["step"])
    return Record(body["step"], body["slots"], states, body["layout"], payload, *of_ranks)


def _listed(place: StatePlace) -> list[Any]:
    tensors = {
        key: [where.offset, list(where.shape), str(where.dtype).removeprefix("torch.")]
        for key, where in place.tensors.items()
    }
    return [place.offset, place.capacity, tensors]


def _place(listed: list[Any]) -> StatePlace:
    offset, capacity, tensors = listed
    places: Mapping[str, Place] = {
        key: Place(start, tuple(shape), getattr(torch, dtype))
        for key, (start, shape, dtype) in tensors.items()
    }
    return StatePlace(offset, capacity, dict(places))
