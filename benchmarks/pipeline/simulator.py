"""Claim: the simulator's bubbles are the formulas', the papers' and those of real processes.

Formulas to 1e-6 for p up to 64; published rates of zero-bubble schedules to 10 %; step times of
torch's own runtime with stages that sleep (2 and 4 gloo processes) to 5 %; a million actions in
at most 4 s of CPU time.

    python benchmarks/pipeline/simulator.py [--repeats 5] [--only formulas|published|real|speed]
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2]))  # tests.helpers: a pipeline that sleeps

from lightning_align.pipelining import SimResult, measured_costs, simulate
from tests.helpers.sleeping_pipeline import sleeping_steps, step_time

EQUAL = {"forward_cost": 1.0, "backward_cost": 2.0, "weight_cost": 1.0}  # T_F = T_B = T_W


def formulas(_: int) -> None:
    """Bubble over ideal: (p - 1) / m, and (p - 1) / (m v) interleaved."""
    worst: dict[str, float] = {}
    for pp in (1, 2, 3, 4, 8, 16, 32, 64):
        for m in (pp, 2 * pp, 4 * pp):
            for name, v in (
                ("GPipe", 1),
                ("1F1B", 1),
                ("Interleaved1F1B", 2),
                ("Interleaved1F1B", 4),
            ):
                expected = (pp - 1) / (m * v)
                distance = abs(simulate(name, pp, m, v).bubble_over_ideal - expected)
                key = f"{name}, v = {v}"
                worst[key] = max(worst.get(key, 0.0), distance)
    for key, distance in worst.items():
        print(f"{key:<24} largest distance from the formula {distance:.1e} (bar 1e-6)")


def published(_: int) -> None:
    """Against the bubble of 1F1B in the same p and m, and activations against its peak."""
    rows: list[tuple[str, str, int, Callable[[SimResult], float], str]] = [
        ("ZB-H1 (ZB1P)", "InterleavedZeroBubble", 1, lambda r: r.bubble_over_ideal, "1/3"),
        ("ZB-H1, two stages", "InterleavedZeroBubble", 2, lambda r: r.bubble_over_ideal, ""),
        ("ZB-V, own steps", "ZBVZeroBubble", 2, lambda r: r.own_bubble_over_ideal, "0"),
        ("ZB-V, common step", "ZBVZeroBubble", 2, lambda r: r.bubble_over_ideal, ""),
        ("DualPipeV", "DualPipeV", 2, lambda r: r.bubble_over_ideal, ""),
    ]
    print(f"{'schedule':<20} {'p':>3} {'m':>4} {'of 1F1B':>8} {'paper':>8} {'peak of 1F1B':>13}")
    for pp, m in ((4, 8), (8, 32), (16, 64), (32, 128)):
        of_1f1b = simulate("1F1B", pp, m, **EQUAL)
        for label, name, v, bubble, paper in rows:
            result = simulate(name, pp, m, v, **EQUAL)
            share = bubble(result) / of_1f1b.bubble_over_ideal
            peak = max(result.peak_activations) / max(of_1f1b.peak_activations)
            print(f"{label:<20} {pp:>3} {m:>4} {share:>8.4f} {paper:>8} {peak:>13.2f}")


def real(repeats: int) -> None:
    """Step time of torch's runtime over the simulated one, from nominal and from measured costs."""
    print(
        f"{'schedule':<16} {'p':>2} {'m':>3} {'real_s':>7} {'nominal_s':>9} {'ratio':>6} "
        f"{'min':>6} {'max':>6} {'of measured costs':>18}"
    )
    for pp, m in ((2, 8), (4, 8)):
        for name, v in (("GPipe", 1), ("1F1B", 1), ("Interleaved1F1B", 2)):
            sleeps = {"forward_s": [0.05] * pp * v, "backward_s": [0.1] * pp * v}
            steps = sleeping_steps(name, pp, m, v, steps=repeats, **sleeps)
            nominal = simulate(name, pp, m, v, forward_cost=0.05, backward_cost=0.1).step_time
            times = [step_time(events) for events in steps]
            ratios = [seconds / nominal for seconds in times]
            of_measured = [
                seconds / simulate(name, pp, m, v, **measured_costs(events)).step_time
                for seconds, events in zip(times, steps, strict=True)
            ]
            print(
                f"{name:<16} {pp:>2} {m:>3} {statistics.median(times):>7.3f} {nominal:>9.3f} "
                f"{statistics.median(ratios):>6.3f} {min(ratios):>6.3f} {max(ratios):>6.3f} "
                f"{statistics.median(of_measured):>18.3f}"
            )


def speed(repeats: int) -> None:
    """CPU time of building and simulating, per million actions."""
    simulate("ZBVZeroBubble", 2, 4)  # imports torch
    print(
        f"{'schedule':<22} {'p':>5} {'m':>7} {'actions':>9} {'median_s':>9} {'min':>6} {'max':>6} "
        f"{'s a million':>12}"
    )
    for name, pp, m in (
        ("1F1B", 512, 1024),
        ("1F1B", 4, 131_072),
        ("GPipe", 512, 1024),
        ("Interleaved1F1B", 512, 512),
        ("InterleavedZeroBubble", 256, 512),
        ("ZBVZeroBubble", 256, 512),
        ("DualPipeV", 256, 512),
        ("1F1B", 2048, 512),
    ):
        times = []
        for _ in range(repeats):
            before = time.process_time()
            result = simulate(name, pp, m)
            times.append(time.process_time() - before)
        median, count = statistics.median(times), len(result.ends)
        print(
            f"{name:<22} {pp:>5} {m:>7} {count:>9} {median:>9.2f} {min(times):>6.2f} "
            f"{max(times):>6.2f} {median / count * 1e6:>12.2f}"
        )


PARTS = {"formulas": formulas, "published": published, "real": real, "speed": speed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=5, help="steps and simulations")
    parser.add_argument("--only", choices=PARTS, help="one part")
    arguments = parser.parse_args()
    for name, part in PARTS.items():
        if arguments.only in (None, name):
            print(f"\n{part.__doc__}\n")
            part(arguments.repeats)


if __name__ == "__main__":
    main()
