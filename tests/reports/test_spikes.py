import json
import warnings

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from lightning.pytorch.loggers import CSVLogger

from lightning_align.reports.spikes import SpikeReport, describe
from lightning_align.spike_incidents import Incident
from tests.helpers import recorder
from tests.test_spike_incidents import an_incident


class TakesAll(CSVLogger):
    """A logger with W&B's words; it notes what it is told."""

    def __init__(self, save_dir):
        super().__init__(save_dir)
        self.got = {}

    @property
    def experiment(self):
        return self

    def log_metrics(self, metrics, step=None):
        self.got["metrics"] = metrics

    def log_image(self, key, images, step=None):
        self.got.setdefault("images", []).append((key, images[0].shape[-1]))

    def log_table(self, key, columns, data, step=None):
        self.got[key] = (columns, data)

    def alert(self, title, text):
        self.got.setdefault("alerts", []).append((title, text))


def test_files_are_json_and_a_picture_per_incident_and_an_overview(tmp_path):
    report, trainer = SpikeReport("spikes"), recorder.trainer(tmp_path)
    first = an_incident(step=3)
    report.follow(trainer)
    report.note(3, 1.0, None)
    report.add(trainer, first)
    report.add(trainer, an_incident(step=3))  # again, after a rewind
    first.notes.append("known later")
    report.update(trainer, first)
    report.end(trainer)
    names = sorted(path.name for path in (tmp_path / "spikes").iterdir())
    stems = ["step_0000003", "step_0000003_2"]
    assert names == sorted(["overview.png", *(s + e for s in stems for e in (".json", ".png"))])
    written = (tmp_path / "spikes/step_0000003.json").read_text()
    assert Incident.from_json(written).notes == ["known later"]


def test_a_remote_folder_takes_them(tmp_path):
    report, trainer = SpikeReport("memory://bucket/spikes"), recorder.trainer(tmp_path)
    report.add(trainer, an_incident())
    files = MemoryFileSystem()
    assert json.loads(files.cat_file("/bucket/spikes/step_0000160.json"))["step"] == 160
    files.rm("/bucket", recursive=True)


def test_loggers_get_scalars_pictures_a_table_of_all_and_an_alert(tmp_path):
    logger = TakesAll(tmp_path)
    report, trainer = SpikeReport(None), recorder.trainer(tmp_path, logger=logger)
    for step in (3, 4):
        report.add(trainer, an_incident(step=step, grad_norm=None))
    report.end(trainer)
    assert logger.got["metrics"] == {"spikes/count": 2.0, "spikes/loss": 9.5}
    assert logger.got["images"] == [("spikes/incident", 3)] * 2 + [("spikes/overview", 3)]
    columns, rows = logger.got["spikes/incidents"]
    assert [dict(zip(columns, row, strict=True))["step"] for row in rows] == [3, 4]
    titles = [title for title, _ in logger.got["alerts"]]
    assert titles == ["Spike at step 3", "Spike at step 4"]
    assert list(tmp_path.iterdir()) == [], "no report_dir, no files"


@pytest.mark.parametrize("folder", ["file.txt/spikes", "nowhere://bucket/spikes"])
def test_what_cannot_be_written_is_warned_of_once_and_stops_nothing(folder, tmp_path):
    (tmp_path / "file.txt").touch()  # a file where the folder should be
    report, trainer = SpikeReport(folder), recorder.trainer(tmp_path)
    with pytest.warns(UserWarning, match=r"report_dir='.*spikes'\): a report was not written"):
        report.add(trainer, an_incident())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report.add(trainer, an_incident())
        report.end(trainer)


def test_a_logger_that_raises_stops_nothing(tmp_path):
    class Raises(TakesAll):
        def log_image(self, key, images, step=None):
            raise RuntimeError("no network")

    logger = Raises(tmp_path)
    report, trainer = SpikeReport(None), recorder.trainer(tmp_path, logger=logger)
    with pytest.warns(UserWarning, match="RuntimeError: no network"):
        report.add(trainer, an_incident())
    assert "alerts" in logger.got


def test_only_rank_zero_writes(tmp_path, monkeypatch):
    report, trainer = SpikeReport("spikes"), recorder.trainer(tmp_path)
    monkeypatch.setattr(type(trainer), "is_global_zero", False)
    report.add(trainer, an_incident())
    report.end(trainer)
    assert list(tmp_path.iterdir()) == []


def test_a_report_without_folder_and_logger_is_read_by_nobody(tmp_path):
    """And keeps no curve of the run, which grows with it."""

    def followed(folder, **options):
        report = SpikeReport(folder)
        report.follow(recorder.trainer(tmp_path, **options))
        report.note(3, 1.0, 2.0)
        return report.is_read, [list(values) for values in report._curve.values()]

    assert followed(None) == (False, [[], [], []])
    assert followed("x") == (True, [[3.0], [1.0], [2.0]])
    assert followed(None, logger=CSVLogger(tmp_path)) == (True, [[3.0], [1.0], [2.0]])


def test_an_incident_in_words():
    assert describe(an_incident(grad_norm=2.0)) == (
        "Step 160: loss 9.5, gradient norm 2; grad norm; skip. Cause: numerics in layers.0. text"
    )
