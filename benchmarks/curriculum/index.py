"""The reduce of difficulties into an index: CPU, wall clock and memory, beside DeepSpeed's.

    python benchmarks/curriculum/index.py                            # 10^8 samples, 5 times
    python benchmarks/curriculum/index.py --samples 1000000 --deepspeed

The difficulties are drawn from 16 bits, lie in a file as a map would leave them, and are read from
there. Each measurement is a process of its own with one thread, so that the peak of its memory
(VmHWM: the program, the pages of the mapped files that it touched) is its own. DeepSpeed's
DataAnalyzer maps first, which is not measured, and then reduces in a process of its own, whose peak
it is; the two sides take turns.

Bars: 8 M samples/s of CPU, 4 M/s of wall clock, 1 GB; 10 times DeepSpeed's wall clock at the
largest size that it finishes in 10 minutes.
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
from statistics import median

import numpy as np
import numpy.typing as npt

sys.path.append(str(Path(__file__).parents[1]))

from hardware import hardware  # the script in the folder above

MAP_PIECE = 1 << 20
LIMIT_S = 3600


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
    peak = max(peak, later.ru_maxrss)  # both in KiB
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
        batch_size=1 << 16,  # the map is faster so, and not measured
        metric_names=["length"],
        metric_functions=[lambda batch: batch],
        metric_types=["single_value_per_sample"],
        metric_dtypes=[torch.int64],
        save_path=str(folder / "deepspeed"),
    )
    analyzer.run_map()
    return measured(analyzer.run_reduce)


def in_process(side: str, folder: Path, samples: int) -> dict[str, float]:
    """A measurement in a process of its own."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    environment = {**os.environ, **threads, "DS_ACCELERATOR": "cpu"}
    arguments = ["--side", side, "--folder", str(folder), "--samples", str(samples)]
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(
        command, env=environment, timeout=LIMIT_S, check=True, stdout=subprocess.PIPE, text=True
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(
        f"{side:<10} {samples:>12,} samples {found['wall_s']:9.2f} s  {found['cpu_s']:9.2f} s CPU"
        f"  peak {found['peak_bytes'] / 1e9:.3f} GB",
        flush=True,
    )
    return found


def spread(values: list[float]) -> str:
    """Median [min, max]."""
    return f"{median(values):.3g} [{min(values):.3g}, {max(values):.3g}]"


def report(side: str, samples: int, found: list[dict[str, float]]) -> None:
    """A row of the table."""
    rates = [spread([samples / each[name] / 1e6 for each in found]) for name in ("cpu_s", "wall_s")]
    peak = spread([each["peak_bytes"] / 1e9 for each in found])
    print(f"| {side} | {samples:,} | {' | '.join(rates)} | {peak} |")


def main() -> None:
    """Measure ours, or both sides."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--samples", type=int, default=100_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--deepspeed", action="store_true", help="measure both sides in turn")
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder by default")
    parser.add_argument("--side", choices=list(SIDES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    samples = options.samples
    if options.side:
        print(json.dumps(SIDES[options.side](options.folder, samples)))
        return
    print(f"{hardware()}\nPython {platform.python_version()}, NumPy {np.__version__}")
    sides = [*SIDES] if options.deepspeed else ["ours"]
    found: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for _ in range(options.repeats):
        for side in sides:
            with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
                draw(Path(temporary) / "values", samples)
                found[side].append(in_process(side, Path(temporary), samples))
    print(
        "| side | samples | M/s of CPU | M/s of wall clock | peak, GB |\n|---|---:|---:|---:|---:|"
    )
    for side in sides:
        report(side, samples, found[side])
    if options.deepspeed:
        for name, words in (("wall_s", "wall clock"), ("cpu_s", "CPU")):
            pairs = zip(found["DeepSpeed"], found["ours"], strict=True)
            ratios = [theirs[name] / ours[name] for theirs, ours in pairs]
            print(f"DeepSpeed's over ours, {words}: {spread(ratios)}")


SIDES = {"ours": ours, "DeepSpeed": theirs}

if __name__ == "__main__":
    main()
