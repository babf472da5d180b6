"""What a fault of the disk is told with: rank, step, path, and what is whole all the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning_align._errors import add_note, argument_error
from lightning_align.offload.record import read_record
from lightning_align.strategies.zero_infinity.blocks import WHERE


@contextmanager
def told_of_set_up(nvme_path: object, folder: Path) -> Iterator[None]:
    """Around the first writing of a rank's files.

    Args:
        nvme_path: As the user gave it.
        folder: Of the rank.

    Raises:
        ValueError: If the disk refuses or is too small.
    """
    try:
        yield
    except OSError as error:
        rule = f"the files of {folder.name} cannot be made in {folder} ({error.strerror})"
        way_out = "Choose another folder, or make room; nothing was trained yet"
        raise argument_error(WHERE, "nvme_path", nvme_path, rule, way_out) from error


def tell_what_is_left(
    error: BaseException, rank: int, step: int, folder: Path, *, atomic_step: bool
) -> None:
    """Say below an error in mid-run from where the run can go on.

    Args:
        error: What ended the run.
        rank: Where.
        step: Optimizer steps that were taken.
        folder: Of the rank.
        atomic_step: Whether a step is there as a whole or not at all.
    """
    try:
        record = read_record(folder)
    except (OSError, ValueError) as damage:
        left = f"no step can be read there: {damage}"
    else:
        if record is None:
            left = "no step was committed there"
        elif not atomic_step:
            left = f"step {record.step} was committed there, and may be damaged: atomic_step=False"
        else:
            left = f"step {record.step} is whole there: go on with fit(ckpt_path='last')"
    note = f"{WHERE}, rank {rank}, after step {step}, in {folder}: {left}."
    add_note(error, note)
