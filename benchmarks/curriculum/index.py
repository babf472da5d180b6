"""The reduce of difficulties into an index: CPU, wall clock and memory, beside DeepSpeed's.

    python benchmarks/curriculum/index.py                      # 10^8 samples, about half a minute
    python benchmarks/curriculum/index.py --samples 10000000
    python benchmarks/curriculum/index.py --deepspeed 600      # DeepSpeed up to 10 minutes a size

The difficulties are drawn from 16 bits, lie in a file as a map would leave them, and are read from
there. Each measurement is a process of its own with one thread, so that the peak of its memory
(VmHWM: the program, the pages of the mapped files that it touched) is its own. DeepSpeed's
DataAnalyzer maps first, which is not measured, and then reduces; its sizes double until one takes
longer than is allowed, and ours is measured at the largest that it finished.

Bars: 8 M samples/s of CPU, 4 M/s of wall clock, 1 GB; 10 times DeepSpeed's wall clock.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

MAP_PIECE = 1 << 20
FIRST_SIZE = 10_000  # of DeepSpeed


def draw(path: Path, samples: int) -> None:
    """Write difficulties as lengths are: many short ones, few long ones."""
    rng = np.random.default_rng(0)
    with path.open("wb") as stream:
        for first in range(0, samples, MAP_PIECE):
            count = min(MAP_PIECE, samples - first)
            drawn = rng.lognormal(8.0, 0.8, count).clip(0, 65535).astype(np.uint16)
            stream.write(drawn.tobytes())


def measured(work: Callable[[], None]) -> dict[str, float]:
    """CPU and wall-clock seconds of ``work``, and the peak memory of this process."""
    before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    work()
    wall = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_SELF)
    later = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = sum(
        end - begin
        for end, begin in (
            (after.ru_utime, before.ru_utime),
            (after.ru_stime, before.ru_stime),
            (later.ru_utime, children.ru_utime),
            (later.ru_stime, children.ru_stime),
        )
    )
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    return {"cpu_s": cpu, "wall_s": wall, "peak_bytes": peak * 1024}


def ours(folder: Path, _: int) -> dict[str, float]:
    """Our reduce."""
    from lightning_align.data.difficulty_reduce import build_index

    def pieces() -> Iterator[npt.NDArray[np.uint16]]:
        with (folder / "values").open("rb") as stream:
            while len(piece := np.fromfile(stream, np.uint16, MAP_PIECE)):
                yield piece

    return measured(lambda: build_index(folder / "index", "length", pieces))


def theirs(folder: Path, samples: int) -> dict[str, float]:
    """DeepSpeed's reduce, after its map."""
    import torch
    from deepspeed.runtime.data_pipeline.data_sampling.data_analyzer import DataAnalyzer

    values = np.fromfile(folder / "values", np.uint16, samples).astype(np.int64)
    analyzer = DataAnalyzer(
        values,
        num_workers=1,
        batch_size=1024,
        metric_names=["length"],
        metric_functions=[lambda batch: batch],
        metric_types=["single_value_per_sample"],
        metric_dtypes=[torch.int64],
        save_path=str(folder / "deepspeed"),
    )
    analyzer.run_map()
    return measured(analyzer.run_reduce)


def in_process(side: str, folder: Path, samples: int, limit: float) -> dict[str, float] | None:
    """A measurement in a process of its own; None if it took too long."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    environment = {**os.environ, **threads, "DS_ACCELERATOR": "cpu"}
    arguments = ["--side", side, "--folder", str(folder), "--samples", str(samples)]
    command = [sys.executable, __file__, *arguments]
    try:
        done = subprocess.run(
            command, env=environment, timeout=limit, check=True, capture_output=True, text=True
        )
    except subprocess.TimeoutExpired:
        return None
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def report(name: str, samples: int, found: dict[str, float]) -> None:
    """A line of the table."""
    cpu, wall = samples / found["cpu_s"] / 1e6, samples / found["wall_s"] / 1e6
    print(
        f"{name:<10} {samples:>12,} samples  {found['wall_s']:9.2f} s  {cpu:8.3f} M/s of CPU"
        f"  {wall:8.3f} M/s of wall clock  peak {found['peak_bytes'] / 1e9:.3f} GB",
        flush=True,
    )


def main() -> None:
    """Measure both sides."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--samples", type=int, default=100_000_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--deepspeed", type=float, default=0.0, metavar="SECONDS")
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder by default")
    parser.add_argument("--side", choices=["ours", "theirs"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        side = {"ours": ours, "theirs": theirs}[options.side]
        print(json.dumps(side(options.folder, options.samples)))
        return
    print(f"Python {platform.python_version()}, NumPy {np.__version__}, {platform.machine()}")
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary)
        draw(folder / "values", options.samples)
        for _ in range(options.repeats):
            report("ours", options.samples, in_process("ours", folder, options.samples, 3600) or {})
        size, finished = FIRST_SIZE, None
        while options.deepspeed:
            draw(folder / "values", size)
            found = in_process("theirs", folder, size, options.deepspeed)
            if found is None:
                break
            report("DeepSpeed", size, found)
            finished, size = (size, found), size * 2
        if finished is not None:
            size, found = finished
            draw(folder / "values", size)
            mine = in_process("ours", folder, size, 3600) or {}
            report("ours", size, mine)
            print(f"DeepSpeed takes {found['wall_s'] / mine['wall_s']:.1f} times as long")


if __name__ == "__main__":
    main()
