"""What a batch costs under a curriculum: 256 indices of 1e8 samples, looked up.

    python benchmarks/curriculum/order.py            # 400 MB on disk; two minutes
    python benchmarks/curriculum/order.py --smoke    # seconds; the figures then mean nothing

The index is a file of sample numbers by difficulty, memory-mapped, in random order. Batches are
those of a CurriculumSampler without replacement, in the middle of its curriculum and behind it.
Most are a slice of what was looked up before, so the mean is shown beside the median. First is a
sampler made anew, with its first batch, in the middle; memory is the peak of what Python and NumPy
allocate from there on, the mapped file not counted. For comparison: the order of a pass drawn as a
whole, as PositionSampler does without a curriculum. CPU time is of one thread.

Two measures are intersected once, and the result is kept beside the first index; in both rows of
them the indices are open already, whose hashes are compared then, the kept one's too.
"""

import argparse
import shutil
import sys
import tempfile
import time
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np

sys.path.append(str(Path(__file__).parents[1]))

from hardware import hardware

from lightning_align.data.curriculum_sampler import CurriculumSampler
from lightning_align.data.difficulty import DifficultyIndex
from lightning_align.data.difficulty_reduce import build_index
from lightning_align.data.eligibility import SortedSamples
from lightning_align.data.keyed_permutation import keys, permuted
from lightning_align.data.sampler import PositionSampler

BATCH, STEPS_PER_LEVEL, CHUNK = 256, 2000, 1 << 16


def write_index(path: Path, num_samples: int, num_levels: int) -> SortedSamples:
    """As many difficulties as there are levels, each of equally many samples."""
    if not path.exists():
        with path.open("wb") as file:
            for first in range(0, num_samples, CHUNK):
                places = np.arange(first, min(first + CHUNK, num_samples))
                sizes = np.full(len(places), num_samples)
                landed = permuted(places, sizes, np.repeat(keys(0, 0), len(places)))
                file.write(landed.astype(np.int32).tobytes())
    offsets = np.arange(num_levels + 1) * num_samples // num_levels
    order = np.memmap(path, np.int32, "r")
    return SimpleNamespace(levels=np.arange(1, num_levels + 1), offsets=offsets, order=order)


def sampler_of(index: SortedSamples) -> CurriculumSampler:
    num_levels = len(index.levels)
    pace = {
        "min_difficulty": 1,
        "max_difficulty": num_levels,
        "schedule_type": "fixed_linear",
        "schedule_config": {
            "total_curriculum_step": STEPS_PER_LEVEL * num_levels,
            "difficulty_step": 1,
        },
    }
    with warnings.catch_warnings():  # a thousand levels are as many as are kept apart
        warnings.simplefilter("ignore")
        return CurriculumSampler(index, pace, BATCH, seed=1)


def times(work: Callable[[int], object], numbers: range) -> tuple[float, float, float]:
    """Median and mean of wall time, and mean of CPU time, in seconds."""
    walls, begun = [], time.process_time()
    for number in numbers:
        start = time.perf_counter()
        work(number)
        walls.append(time.perf_counter() - start)
    return median(walls), sum(walls) / len(walls), (time.process_time() - begun) / len(walls)


def first_batch(index: SortedSamples, number: int) -> tuple[float, float]:
    """Milliseconds of CPU and MB at the peak until a sampler made anew has its first batch."""
    begun = time.process_time()
    sampler_of(index).batch(number)
    cpu = (time.process_time() - begun) * 1e3
    tracemalloc.start()
    sampler = sampler_of(index)
    for n in range(number, number + 100):
        sampler.batch(n)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return cpu, peak / 1e6


def difficulties(num_samples: int, seed: int) -> Iterator[np.ndarray[Any, Any]]:
    """A thousand of them, by chance."""
    for begin in range(0, num_samples, CHUNK):
        generator = np.random.default_rng([seed, begin])
        yield generator.integers(1, 1001, min(CHUNK, num_samples - begin), np.uint16)


def intersected(folder: Path, num_samples: int) -> list[tuple[float, float]]:
    """The same for a sampler of two measures of a thousand levels, and for one that comes later."""
    pace = {
        "min_difficulty": 1,
        "max_difficulty": 1000,
        "schedule_type": "fixed_linear",
        "schedule_config": {"total_curriculum_step": STEPS_PER_LEVEL * 1000, "difficulty_step": 1},
    }
    for seed, name in enumerate(("first", "second")):
        build_index(folder / name, name, partial(difficulties, num_samples, seed))
    opened = {name: DifficultyIndex.open(folder / name) for name in ("first", "second")}

    def first() -> float:
        begun = time.process_time()
        sampler = CurriculumSampler(opened, dict.fromkeys(opened, pace), BATCH, seed=1)
        sampler.batch(STEPS_PER_LEVEL * 500)
        return (time.process_time() - begun) * 1e3

    def peak() -> float:
        tracemalloc.start()
        first()
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most / 1e6

    once, later, least = first(), median(first() for _ in range(5)), peak()
    for kept in (folder / "first").glob("intersection-*"):
        shutil.rmtree(kept)
    return [(once, peak()), (later, least)]


def report(name: str, figures: tuple[float, float, float]) -> None:
    middle, mean, cpu = (1e6 * figure for figure in figures)
    print(f"{name:40} median {middle:6.1f} us, mean {mean:6.1f} us, CPU {cpu:6.1f} us", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="few samples and batches")
    parser.add_argument("--samples", type=int, default=10**8, help="samples in the index")
    parser.add_argument("--batches", type=int, default=6400, help="batches that are timed")
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.samples, arguments.batches = 10**6, 320
    print(f"{hardware()}; NumPy {np.__version__}; {arguments.samples} samples")
    with tempfile.TemporaryDirectory() as folder:
        for num_levels in (64, 1000):
            index = write_index(Path(folder) / "order.bin", arguments.samples, num_levels)
            middle = STEPS_PER_LEVEL * num_levels // 2 + 100
            firsts = [first_batch(index, middle + 1000 * repeat) for repeat in range(5)]
            cpu, memory = (median(column) for column in zip(*firsts, strict=True))
            print(f"{num_levels} levels: first batch {cpu:.2f} ms of CPU, {memory:.1f} MB at most")
            sampler = sampler_of(index)
            numbers = range(middle, middle + arguments.batches)
            report(f"{num_levels} levels, in the middle", times(sampler.batch, numbers))
            last = STEPS_PER_LEVEL * num_levels
            numbers = range(last, last + arguments.batches)
            report(f"{num_levels} levels, behind the last", times(sampler.batch, numbers))
        rows = intersected(Path(folder), arguments.samples)
        for when, (cpu, memory) in zip(("once", "later"), rows, strict=True):
            print(f"two measures, {when}: first batch {cpu:.2f} ms of CPU, {memory:.1f} MB at most")
        whole = PositionSampler(arguments.samples, BATCH, seed=1)
        begun = time.process_time()
        whole.batch(0)
        print(f"a pass drawn as a whole: first batch {time.process_time() - begun:.2f} s of CPU")
        report("a pass drawn as a whole", times(whole.batch, range(1, arguments.batches)))


if __name__ == "__main__":
    main()
