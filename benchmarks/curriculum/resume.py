"""Batches behind a resume against those of the run that went on, ours and DeepSpeed's sampler.

    python benchmarks/curriculum/resume.py            # half a minute
    python benchmarks/curriculum/resume.py --smoke    # seconds

Needs deepspeed (0.19.8 was read) and a compiler, as it builds its communication; DS_ACCELERATOR=cpu
is set. Both draw from the same 4000 samples
of 100 difficulties by the same pacing, 10 to 100 in 60 steps, in batches of 16. At random batches a
state is saved, plain or pickled, and a new sampler goes on with it for 20 batches. A resume counts
if all of them are equal.

DeepSpeed's sampler runs on one rank (gloo), without a DataLoader, each resume with a copy of the
cluster files as they were when its state was saved. It is asked twice: as it is, and with its own
generator put back by hand, to see what is left. Ours is asked in a DataLoader with 0 and 2 workers,
on 1 and 2 ranks, and from 2 ranks on 1 and from 1 on 2 at the same global batch.
"""

import argparse
import contextlib
import copy
import io
import itertools
import os
import pickle
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch import distributed
from torch.utils.data import DataLoader

sys.path.append(str(Path(__file__).parents[1]))

from hardware import hardware

from lightning_align.data.curriculum_sampler import CurriculumSampler

SAMPLES, BATCH, BEHIND, LAST = 4000, 16, 20, 150
PACE = {
    "min_difficulty": 10,
    "max_difficulty": 100,
    "schedule_type": "fixed_linear",
    "schedule_config": {"total_curriculum_step": 60, "difficulty_step": 10},
}


class Numbers:
    """A dataset whose batches are the numbers of their samples."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, indices: list[int]) -> list[int]:
        return indices


def ours(
    difficulties: np.ndarray, position: int, ranks: int, workers: int
) -> Iterator[tuple[int, ...]]:
    """Global batches from a position on."""
    loaders = [
        DataLoader(
            Numbers(),  # type: ignore[arg-type]
            sampler=CurriculumSampler(
                difficulties,
                PACE,
                BATCH // ranks,
                seed=1,
                num_replicas=ranks,
                rank=rank,
                position=lambda: position,
            ),
            batch_size=None,
            num_workers=workers,
        )
        for rank in range(ranks)
    ]
    for parts in zip(*loaders, strict=True):
        yield tuple(itertools.chain.from_iterable(parts))


def write_index(folder: Path, difficulties: np.ndarray) -> dict[str, str]:
    """DeepSpeed's two files of samples by difficulty."""
    from deepspeed.runtime.data_pipeline.data_sampling import utils

    paths = {}
    rows = {
        "index_to_sample": [np.flatnonzero(difficulties == d) for d in np.unique(difficulties)],
        "index_to_metric": [np.array([d]) for d in np.unique(difficulties)],
    }
    for name, arrays in rows.items():
        paths[f"{name}_path"] = str(folder / name)
        builder = utils.create_mmap_dataset_builder(str(folder / name), np.int64)
        for array in arrays:
            builder.add_item_numpy(array)
        utils.close_mmap_dataset_builder(builder, str(folder / name))
    return paths


def theirs(index: dict[str, str], clusters: Path) -> Any:
    from deepspeed.runtime.data_pipeline.data_sampling.data_sampler import DeepSpeedDataSampler

    metric = {**PACE, **index, "difficulty_type": "value", "clustering_type": "schedule_based"}
    learning = {
        "enabled": True,
        "data_cluster_path": str(clusters),
        "curriculum_metrics": {"length": metric},
    }
    sampling = {"enabled": True, "num_epochs": 1000, "curriculum_learning": learning}
    config = {"enabled": True, "seed": 1, "data_sampling": sampling}
    group = distributed.group.WORLD
    return DeepSpeedDataSampler(config, SAMPLES, BATCH, 0, 1, group, 1, 0)


def numbers(batches: Iterator[list[Any]], count: int) -> list[tuple[int, ...]]:
    return [tuple(map(int, batch)) for batch in itertools.islice(batches, count)]


def resumes_of_theirs(folder: Path, positions: list[int], difficulties: np.ndarray) -> list[int]:
    """How many resumes were equal: as it is, and with its own generator put back."""
    index, equal = write_index(folder, difficulties), [0, 0]
    for position in positions:
        run = theirs(index, folder / f"run {position}")
        batches = iter(run)
        numbers(batches, position)
        state = pickle.dumps(run.state_dict())
        generator = copy.deepcopy(run.np_rng.bit_generator.state)
        for number in range(2):
            shutil.copytree(folder / f"run {position}", folder / f"resumed {position} {number}")
        # What it yielded last it counts when it is asked for the next.
        went_on = numbers(batches, BEHIND)
        for number in range(2):
            resumed = theirs(index, folder / f"resumed {position} {number}")
            resumed.load_state_dict(pickle.loads(state))
            if number:
                resumed.np_rng.bit_generator.state = generator
            equal[number] += numbers(iter(resumed), BEHIND) == went_on
    return equal


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="two resumes instead of twenty")
    arguments = parser.parse_args()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    print(f"{hardware()}; deepspeed {deepspeed.__version__}, NumPy {np.__version__}")
    count = 2 if arguments.smoke else 20
    positions = random.Random(0).sample(range(1, LAST), count)
    difficulties = np.random.default_rng(0).integers(1, 101, SAMPLES)
    whole = list(itertools.islice(ours(difficulties, 0, 1, 0), LAST + BEHIND))
    for ranks, workers in ((1, 0), (1, 2), (2, 0), (2, 2)):
        equal = sum(
            [*itertools.islice(ours(difficulties, position, ranks, workers), BEHIND)]
            == whole[position : position + BEHIND]
            for position in positions
        )
        print(f"ours, on {ranks} rank(s), {workers} workers: {equal} of {count} resumes are equal")
    with tempfile.TemporaryDirectory() as folder:
        store = distributed.FileStore(f"{folder}/store", 1)
        distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        deepspeed.init_distributed("gloo", verbose=False)
        with contextlib.redirect_stdout(io.StringIO()):  # what it says of every file
            equal, with_generator = resumes_of_theirs(Path(folder), positions, difficulties)
        distributed.destroy_process_group()
    print(f"DeepSpeed's, on 1 rank: {equal} of {count} resumes are equal")
    print(f"DeepSpeed's, its generator put back by hand: {with_generator} of {count}")


if __name__ == "__main__":
    main()
