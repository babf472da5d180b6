"""Claim: `import lightning_align` costs at most 1.1x `import lightning`.

Fresh interpreters, alternated so that a slow minute of the machine hits every row alike; CPU time
of the child, since importing is computing and reading warm files. The last row also resolves every
public name.

    python benchmarks/import_time.py [--repeats 7]
"""

import argparse
import resource
import statistics
import subprocess
import sys

STATEMENTS = {
    "import lightning": "import lightning",
    "import lightning_align": "import lightning_align",
    "every public name of lightning_align": (
        "import lightning_align as la; [getattr(la, name) for name in la.__all__]"
    ),
}


def cpu_seconds(statement: str) -> float:
    """CPU time that a fresh interpreter spends on `statement`."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", statement], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=7, help="interpreters per row, at least 5")
    repeats = max(5, parser.parse_args().repeats)

    for statement in STATEMENTS.values():  # warm-up: bytecode and the page cache
        cpu_seconds(statement)
    times: dict[str, list[float]] = {name: [] for name in STATEMENTS}
    for _ in range(repeats):
        for name, statement in STATEMENTS.items():
            times[name].append(cpu_seconds(statement))

    base = statistics.median(times["import lightning"])
    print(f"{'CPU time':<40} {'median_s':>9} {'min_s':>7} {'max_s':>7} {'ratio':>6}")
    for name, row in times.items():
        median = statistics.median(row)
        print(f"{name:<40} {median:9.2f} {min(row):7.2f} {max(row):7.2f} {median / base:6.2f}")


if __name__ == "__main__":
    main()
