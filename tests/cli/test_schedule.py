"""lightning-align schedule: figures, files and mistakes."""

import json
from pathlib import Path

import pytest

from lightning_align.__main__ import main
from lightning_align.pipelining import read_schedule_csv


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    main(["schedule", *arguments])
    return capsys.readouterr().out.splitlines()


INTERLEAVED = ["--schedule", "Interleaved1F1B", "--pp", "4", "--num_microbatches", "8"]


def test_it_prints_the_figures_of_a_schedule(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, *INTERLEAVED) == [
        "Interleaved1F1B: 4 ranks, 8 stages, 8 microbatches",
        "step time          57",
        "busiest rank       48",
        "bubble over ideal  18.75%",
        "rank  stages  busy  waits  peak activations",
        "0     0,4     48    15.8%  5.5",
        "1     1,5     48    15.8%  4.5",
        "2     2,6     48    15.8%  3.5",
        "3     3,7     48    15.8%  2.5",
    ]


def test_it_draws_and_writes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    png, trace, csv = (str(tmp_path / name) for name in ("a.png", "a.json", "a.csv"))
    lines = run(capsys, *INTERLEAVED, "--png", png, "--trace", trace, "--csv", csv)
    assert lines[-3:] == [f"wrote {png}", f"wrote {trace}", f"wrote {csv}"]
    assert Path(png).read_bytes().startswith(b"\x89PNG")
    assert len(json.loads(Path(trace).read_text())["traceEvents"]) == 1 + 4 + 2 * 64
    assert read_schedule_csv(csv).num_stages == 8
    assert run(capsys, "--schedule_csv", csv)[1:] == run(capsys, *INTERLEAVED)[1:]


def test_costs_are_numbers_or_lists(capsys: pytest.CaptureFixture[str]) -> None:
    two = ["--schedule", "1F1B", "--pp", "2", "--num_microbatches", "1"]
    lines = run(capsys, *two, "--forward_cost", "1,4", "--saved_bytes", "[5e3, 7]")
    assert lines[1] == "step time          9"
    assert lines[-2:] == [
        "0     0       3     66.7%  1                 5,000",
        "1     1       6     33.3%  1                 7",
    ]


def test_without_a_schedule_all_are_compared_on_the_same_model(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The costs are a rank's: half of them for each stage where a rank has two."""
    lines = run(capsys, "--pp", "4", "--num_microbatches", "6")
    assert [line.split() for line in lines[:4]] == [
        ["schedule", "stages", "step", "time", "bubble", "over", "ideal", "peak", "activations"],
        ["GPipe", "4", "27", "50.00%", "6"],
        ["1F1B", "4", "27", "50.00%", "4"],
        ["Interleaved1F1B", "8", "22.5", "25.00%", lines[3].split()[-1]],
    ]
    assert lines[-1] == (
        "schedule(num_microbatches=6): DualPipeV needs as many microbatches as stages, 8."
    )


def test_of_many_ranks_the_first_and_the_last_are_shown(
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = run(capsys, "--schedule", "1F1B", "--pp", "100", "--num_microbatches", "100")
    assert [line.split()[0] for line in lines[5:]] == [
        "0",
        "1",
        "2",
        "3",
        "...",
        "96",
        "97",
        "98",
        "99",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "--schedule 2F2B --pp 2 --num_microbatches 4",
            r"schedule\(schedule='2F2B'\): must be one",
        ),
        ("--schedule 1F1B --num_microbatches 4", r"schedule\(pp=None\): must be given with"),
        ("--pp 0 --num_microbatches 4", r"schedule\(pp=0\): must be an integer of at least 1"),
        (
            "--pp 2 --num_microbatches 4 --forward_cost 1,2",
            r"all of them are compared. Give --sche",
        ),
        (
            "--pp 2 --num_microbatches 4 --png a.png",
            r"schedule\(png='a.png'\): is for one schedule",
        ),
        ("--schedule 1F1B --schedule_csv a.csv", r"schedule\(schedule='1F1B'\): the file has its"),
        (
            "--schedule_csv none.csv",
            r"schedule\(schedule_csv='none.csv'\): cannot be read .*No such",
        ),
        ("--schedule 1F1B --pp 2 --num_microbatches 4 --forward_cost a,1", r"must be a number, or"),
        (
            "--schedule 1F1B --pp 2 --num_microbatches 4 --png a.wrong",
            r"be written: Format 'wrong'",
        ),
        ("--schedule 1F1B --pp 2 --num_microbatches 4 --trace /none/a", r"be written: .*No such"),
    ],
)
def test_a_mistake_is_told_in_two_lines(
    arguments: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message) as end:
        main(["schedule", *arguments.split()])
    assert len(str(end.value).splitlines()) == 2


def test_a_word_for_a_number_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["schedule", "--schedule", "1F1B", "--pp", "two", "--num_microbatches", "4"])
    assert capsys.readouterr().err.splitlines()[0].endswith("pp: must be int, not two.")
