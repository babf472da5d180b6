"""``lightning-align spikes``: tables of incidents, skip lists, spikes in metrics of anybody."""

import csv
import gzip
import math
import random

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from lightning_align.__main__ import main
from lightning_align.cli.spikes import batches_to_skip, read_incidents, spikes
from lightning_align.data.skip_list import read_skip_list
from lightning_align.spike_causes import Cause
from lightning_align.spike_incidents import BatchRecord
from tests.test_spike_incidents import an_incident


@pytest.fixture
def folder(tmp_path):
    for incident in (
        an_incident(step=7, loss=math.nan, skipped=[[14, 16]], batches=[]),
        an_incident(step=30, skipped=[], action="log", cause=Cause("data", None, "It is so.")),
        an_incident(step=31, skipped=[], action="log", cause=Cause("learning rate")),
    ):
        path = tmp_path / "reports" / f"step_{incident.step:07d}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(incident.to_json())
    (tmp_path / "reports/step_0000007.png").write_bytes(b"")
    return tmp_path / "reports"


def test_incidents_are_a_table_and_their_causes_sentences(folder, capsys):
    main(["spikes", str(folder)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["step", "epoch", "batches", "loss", "grad", "norm", *WORDS]
    shown = ["7", "3", "321", "nan", "inf", "grad", "norm", "skip", "numerics", "in", "layers.0"]
    assert lines[1].split() == shown
    assert lines[2].split()[:3] == ["30", "3", "321-322"]
    assert lines[-1] == "step 30: It is so."


WORDS = ["alarm", "action", "cause"]


def test_a_skip_list_has_what_was_left_out_and_where_data_was_the_cause(folder):
    """The learning rate is no reason to leave a batch out."""
    assert batches_to_skip(read_incidents(str(folder))).plain() == [[14, 16], [321, 323]]


def test_a_skip_list_is_what_a_new_run_takes(folder, tmp_path, capsys):
    main(["spikes", str(folder), "--skip_list", str(tmp_path / "new/skip.json")])
    assert capsys.readouterr().out.endswith("skip.json: 4 batches to leave out\n")
    skipped, stream = read_skip_list(str(tmp_path / "new/skip.json"))
    assert skipped.plain() == [[14, 16], [321, 323]]
    assert stream == an_incident().stream


@pytest.mark.parametrize(
    ("stream", "path", "rule"),
    [
        ({"seed": 1}, "s.json", "of runs with different data or seeds"),
        ({"seed": 0, "fingerprint": "NaN"}, "file/s.json", "cannot be written"),
    ],
)
def test_a_skip_list_that_cannot_be_is_refused(stream, path, rule, folder, tmp_path):
    (tmp_path / "file").touch()
    (folder / "step_0000099.json").write_text(an_incident(step=99, stream=stream).to_json())
    with pytest.raises(SystemExit, match=rule):
        main(["spikes", str(folder), "--skip_list", str(tmp_path / path)])
    for report in folder.glob("*.json"):
        report.write_text(an_incident(stream={}).to_json())
    with pytest.raises(SystemExit, match="no report says which stream"):
        main(["spikes", str(folder), "--skip_list", str(tmp_path / path)])


def test_a_remote_folder_is_read():
    files = MemoryFileSystem()
    files.pipe_file("/bucket/r/step_0000160.json", an_incident().to_json().encode())
    (incident,) = read_incidents("memory://bucket/r")
    files.rm("/bucket", recursive=True)
    assert incident.batches[1] == BatchRecord(322)


def test_a_folder_without_reports_says_so(tmp_path):
    assert spikes(tmp_path) == "No incidents."


def write_metrics(path, names, count=120, spike_at=100):
    """As CSVLogger does it: rows of a validation have no loss of training."""
    draw = random.Random(0)
    file = gzip.open(path, "wt") if path.suffix == ".gz" else open(path, "w")  # noqa: SIM115
    with file:
        writer = csv.DictWriter(file, names, delimiter="\t" if ".tsv" in path.name else ",")
        writer.writeheader()
        for step in range(count):
            loss = 9.0 if step == spike_at else 2 + 0.02 * draw.random()
            row = dict(zip(names, (step * 10, loss, 0.5 + 0.1 * draw.random()), strict=False))
            writer.writerow(row)
            writer.writerow({names[0]: step * 10})


@pytest.mark.parametrize("name", ["metrics.csv", "metrics.tsv", "metrics.csv.gz"])
def test_spikes_of_a_csv_logger_are_found(name, tmp_path, capsys):
    write_metrics(tmp_path / name, ["step", "train_loss", "grad_norm", "val_loss"])
    main(["spikes", "--csv", str(tmp_path / name)])
    header, alarm, summary = capsys.readouterr().out.splitlines()
    assert header.split()[:2] == ["step", "loss"]
    assert alarm.split()[:2] == ["1000", "9"]
    assert summary == f"1 alarm in 120 rows of {tmp_path / name}"


def test_columns_of_another_framework_are_named(tmp_path):
    write_metrics(tmp_path / "log.csv", ["_step", "train/loss", "train/norm"])
    found = spikes(
        csv=tmp_path / "log.csv",
        step_column="_step",
        loss_column="train/loss",
        grad_norm_column="train/norm",
    )
    assert found.splitlines()[1].split()[0] == "1000"
    without = spikes(csv=tmp_path / "log.csv", step_column="none", loss_column="train/loss")
    assert without.splitlines()[1].split()[0] == "200", "every second row has a loss"


def test_a_calm_csv_has_no_alarm(tmp_path):
    write_metrics(tmp_path / "m.csv", ["step", "train_loss"], spike_at=None)
    expected = f"0 alarms in 120 rows of {tmp_path / 'm.csv'}, judged by the loss alone: there is"
    assert spikes(csv=tmp_path / "m.csv") == f"{expected} no gradient norm in column grad_norm"


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        ([], "give the folder of a run's reports, or a metrics file"),
        (["r", "--csv", "m.csv"], "give the folder of a run's reports, or a metrics file"),
        (["nowhere"], r"folder='nowhere'\): there is no such folder"),
        (["no://where"], r"folder='no://where'\): cannot be read: Protocol not known"),
        (["--csv", "nowhere.csv"], r"csv='nowhere.csv'\): cannot be read"),
        (["--csv", "m.csv", "--skip_list", "s"], "a metrics file knows no batches"),
        (["--csv", "m.csv", "--window", "4"], r"window=4\): must be at least 8"),
        (
            ["--csv", "m.csv", "--loss_column", "train_los"],
            "no such column; it has step, train_loss. Did you mean train_loss?",
        ),
        (["--csv", "words.csv"], "has 'low' in column train_loss, which is no number"),
        (["bad"], "is no report of an incident"),
        (["bad", "--window", "32"], r"window=32\): is for the rows of a metrics file, and reports"),
        (["bad", "--warmup", "8"], r"warmup=8\): is for the rows"),
        (["bad", "--loss_column", "loss"], r"loss_column='loss'\): is for the rows"),
    ],
)
def test_a_mistake_is_a_line_with_the_rule(arguments, rule, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_metrics(tmp_path / "m.csv", ["step", "train_loss"])
    (tmp_path / "words.csv").write_text("step,train_loss\n1,low\n")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/step_0000001.json").write_text("{}")
    with pytest.raises(SystemExit, match=rule) as error:
        main(["spikes", *arguments])
    assert str(error.value).count("\n") < 2
