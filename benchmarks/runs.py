"""What studies share: the novels as bytes, and runs that are kept once finished.

A run is a line of JSON in the file of its study. What is there is not run again.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import logging
import lzma
import sys
import time
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

CACHE = Path(__file__).parent / "cache/spikes"
NOVELS = Path(__file__).parent / "data"


def as_tokens(text: bytes) -> Tensor:
    """Bytes as numbers below 128."""
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long().clamp(max=127)


@cache
def read_novels() -> Tensor:
    """All novels, one behind the other."""
    texts = []
    for path in sorted(NOVELS.glob("*.txt.xz")):
        with lzma.open(path) as file:
            texts.append(file.read())
    return as_tokens(b"".join(texts))


def or_inf(value: float) -> float:
    """A loss that is not a number is the worst one, and not one that compares to nothing."""
    return value if value == value else float("inf")


class Runs:
    """Finished runs by name, which several processes may add to.

    Args:
        path: The file; it and its folder are made with the first run.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, Any] = {}
        self.read()

    def read(self) -> None:
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        # The last line of a process that was killed may be a piece of one.
        whole = [json.loads(line) for line in lines if line.endswith("}")]
        self.found = {line.pop("name"): line for line in whole}

    def finish(
        self, names: Iterable[str], run: Callable[[str], dict[str, Any]], limit: int | None
    ) -> int:
        """Run what is missing of ``names`` and no other process is at; how many were run.

        Args:
            names: Of runs.
            run: Of a name.
            limit: Runs to do at most.
        """
        done = 0
        for name in names:
            if done == limit or name in self.found:
                continue
            with self.claim(name) as mine:
                if mine:
                    start = time.process_time()
                    found = {**run(name), "cpu_s": round(time.process_time() - start, 2)}
                    with self.path.open("a") as file:
                        file.write(json.dumps({"name": name, **found}) + "\n")
                    done += 1
                    sys.stderr.write(f"{done} {name}: {found['cpu_s']} s CPU\n")
        self.read()
        return done

    @contextmanager
    def claim(self, name: str) -> Iterator[bool]:
        """Whether this process is to run it; a process that dies gives its claim back."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.with_suffix(".lock").open("w") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, zlib.crc32(name.encode()))
            except OSError:
                yield False
                return
            self.read()
            yield name not in self.found

    def named(self, pattern: str, seeds: Iterable[int]) -> list[dict[str, Any]]:
        """Those of ``pattern``, which has a place {seed}, that are finished."""
        names = [pattern.format(seed=seed) for seed in seeds]
        return [self.found[name] for name in names if name in self.found]


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The options of every study here."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, default=CACHE, help="folder of finished runs")
    parser.add_argument("--limit", type=int, help="run so many at most, then report")
    parser.add_argument("--report", action="store_const", const=0, dest="limit", help="run nothing")
    return parser


def given_to(parser: argparse.ArgumentParser, cache: Path) -> argparse.Namespace:
    """What the command line says; from then on one thread, no chatter, and versions are printed.

    Args:
        parser: That of ``arguments``, with the options of the study.
        cache: Folder of its finished runs, if the command line names no other.
    """
    parser.set_defaults(runs=cache)
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    print(f"torch {torch.__version__}, lightning {pl.__version__}")
    return given
