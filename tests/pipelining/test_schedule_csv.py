"""Schedules as files: torch reads what we write, and what is wrong in one is named."""

from pathlib import Path

import pytest
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, _Action

from lightning_align.pipelining import (
    SCHEDULES,
    build_schedule,
    read_schedule_csv,
    simulate,
    write_schedule_csv,
)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_a_schedule_returns_from_its_file(name: str, tmp_path: Path) -> None:
    schedule = build_schedule(name, 4, 8)
    write_schedule_csv(schedule, tmp_path / "order.csv")
    again = read_schedule_csv(tmp_path / "order.csv")
    assert (again.num_stages, again.num_microbatches) == (schedule.num_stages, 8)
    for rank in range(4):
        assert again.actions(rank) == schedule.actions(rank)


def test_torch_reads_what_we_write(tmp_path: Path) -> None:
    schedule = build_schedule("Interleaved1F1B", 2, 4)
    write_schedule_csv(schedule, tmp_path / "order.csv")
    theirs = object.__new__(PipelineScheduleMulti)
    theirs.pipeline_order = {}
    theirs.pp_group_size, theirs._num_stages, theirs._n_microbatches = 2, 4, 4
    theirs._stages = []
    theirs._load_csv(str(tmp_path / "order.csv"))
    for rank in range(2):
        ours = [_Action.from_str(str(action)) for action in schedule.actions(rank)]
        assert theirs.pipeline_order[rank] == ours


def test_empty_cells_and_overlapped_pairs_are_read(tmp_path: Path) -> None:
    path = tmp_path / "order.csv"
    path.write_text("0F0,,(0F1;0B0)OVERLAP_F_B, 0B1\n\n")
    actions = read_schedule_csv(path).actions(0)
    assert [str(action) for action in actions] == ["0F0", "0F1", "0B0", "0B1"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0F0,0B0\n1B0,1F0\n", r"rank 1 \(row 2\), action 1 is 1B0, before 1F0\."),
        ("0F0,0B0\n\n1F0,1B0\n", r"rank 1 \(row 2\) has no actions"),
        ("0F0,0B0\n7F9000000,1B0\n", r"4 actions are too few for 8 stages and 9000001 microb"),
        ("0F0,0SEND_F0\n", r"rank 0 \(row 1\), cell 2 is '0SEND_F0'. Write stage, one of F, B, I"),
        ("0F0,forward\n", r"cell 2 is 'forward'"),
        ("", "has no actions"),
    ],
)
def test_a_fault_is_named_with_rank_row_and_action(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "order.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"PipelineStrategy\(schedule_csv='.*csv'\): .*{message}"):
        read_schedule_csv(path, where="PipelineStrategy", argument="schedule_csv")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"path='.*none.csv'\): cannot be read .*No such file"):
        read_schedule_csv(tmp_path / "none.csv")


def test_ranks_that_wait_for_each_other_are_named(tmp_path: Path) -> None:
    """Rank 0 wants the gradient of microbatch 1 first, rank 1 its forward of microbatch 0 first."""
    path = tmp_path / "order.csv"
    path.write_text("0F1,0B1,0F0,0B0\n1F0,1F1,1B1,1B0\n")
    message = (
        r"simulate\(schedule='order.csv'\): ranks wait for each other: rank 0 stops before 0B1, "
        r"which needs 1B1 of rank 1; rank 1 stops before 1F0, which needs 0F0 of rank 0\."
    )
    with pytest.raises(ValueError, match=message):
        simulate(read_schedule_csv(path))
