"""Claim: once a rank of a pipeline is killed or raises, the others end within 10 s.

Seconds from the end of the process that failed to that of the last other one, in the middle of a
batch, under 1F1B; nothing comes in between but what the ranks notice themselves. (torch alone waits
for the time-out of the process group, 30 minutes, if no connection breaks.)

    python benchmarks/pipeline/failure.py [--repeats 7]
"""

import argparse
import signal
import statistics
import sys
from pathlib import Path
from typing import Any

from torch import nn

sys.path.append(str(Path(__file__).parents[2]))  # tests.helpers: forked ranks

from tests.helpers.ranks import end_of_ranks
from tests.strategies.pipeline.test_failures import RUN, Fault

# Ranks -> layers of each stage: embedding, four blocks, head. The fault is in block 1.
PARTITIONS = {2: [3, 3], 4: [2, 1, 1, 2]}
FAILING = {2: 0, 4: 1}


def train(rank: int, ranks: int, kind: str, backward: bool) -> None:
    with RUN.setting(rank, ranks) as (trainer, _):
        module: Any = RUN.module()
        module.blocks[1] = nn.Sequential(module.blocks[1], Fault(10, kind, backward))
        trainer.strategy.partition_method = PARTITIONS[ranks]
        trainer.fit(module, RUN.loader())


def seconds_to_the_end(ranks: int, kind: str, backward: bool) -> float:
    ended = end_of_ranks(
        lambda rank: train(rank, ranks, kind, backward), ranks, timeout_s=120, grace_s=100
    )
    failed = ended.pop(FAILING[ranks])
    assert failed.exit_code == -signal.SIGKILL if kind == "kill" else "the cause" in failed.error
    assert all("PipelineError" in end.error and not end.stuck for end in ended), ended
    return max(end.seconds for end in ended) - failed.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    print("ranks  failure                seconds to the end of the last rank: median, min, max")
    for ranks in PARTITIONS:
        for kind, backward in (("raise", False), ("raise", True), ("kill", False), ("kill", True)):
            found = [seconds_to_the_end(ranks, kind, backward) for _ in range(arguments.repeats)]
            where = "backward" if backward else "forward"
            figures = f"{statistics.median(found):.2f}, {min(found):.2f}, {max(found):.2f}"
            print(f"{ranks:<6} {kind + ' in ' + where:<22} {figures}", flush=True)


if __name__ == "__main__":
    main()
