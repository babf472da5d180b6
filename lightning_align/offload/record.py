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

from lightning_align.offload.block import Place

FORMAT = 1
FILE = "committed"


@dataclass
class StatePlace:
    """Where the optimizer's tensors of one parameter lie in the file of its block."""

    offset: int
    capacity: int  # bytes that are theirs
    tensors: dict[str, Place]  # offsets from ``offset`` on


@dataclass
class Record:
    """A committed step.

    Attributes:
        step: Optimizer steps that are part of the values.
        slots: Block -> which of its two files has them.
        states: Block -> parameter -> where its optimizer state is.
        layout: Digest of what the blocks are made of.
        payload: What else belongs to that step, as the caller gave it.
    """

    step: int
    slots: dict[str, int]
    states: dict[str, dict[str, StatePlace]]
    layout: str
    payload: bytes

    def write(self, folder: Path) -> None:
        """Put the record in the place of the one before; what it names must be durable."""
        body = {
            "format": FORMAT,
            "step": self.step,
            "slots": self.slots,
            "states": {
                block: {name: _listed(place) for name, place in places.items()}
                for block, places in self.states.items()
            },
            "layout": self.layout,
            "payload": [len(self.payload), xxhash.xxh3_128_hexdigest(self.payload)],
        }
        head = json.dumps(body).encode()
        digest = xxhash.xxh3_128_hexdigest(head).encode()
        unfinished = folder / f"{FILE}.new"
        with unfinished.open("wb") as file:
            file.writelines([digest, b"\n", head, b"\n", self.payload])
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(folder / FILE)
        sync_folder(folder)


def read_record(folder: Path) -> Record | None:
    """The committed step of a folder; None if there is none.

    Args:
        folder: Of a store.

    Raises:
        ValueError: If the record is damaged.
    """
    path = folder / FILE
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
    return Record(body["step"], body["slots"], states, body["layout"], payload)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
