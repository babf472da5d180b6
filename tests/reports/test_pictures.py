import io
import sys
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import DummyLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader

from lightning_align._compat.lightning_resume import resolve_checkpoint_dir
from lightning_align.callbacks.metric_plot import MetricPlot
from lightning_align.figure import new_figure
from lightning_align.reports.pictures import log_figure
from tests.helpers.wandb_reader import read_wandb_run

WIDTH, HEIGHT = 300, 150  # pixels: 2 x 1 inches at 150 dots per inch


@pytest.fixture
def figure():
    """Blue, all of it, so that a channel mix-up shows."""
    figure = new_figure(2, 1)
    figure.set_facecolor((0.0, 0.0, 1.0))
    return figure


def make_trainer(tmp_path, *loggers, **options):
    return pl.Trainer(
        accelerator="cpu",
        default_root_dir=tmp_path,
        logger=list(loggers),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


class TakesImages(CSVLogger):
    """Any logger with W&B's word for it; we have never seen its class."""

    def __init__(self, save_dir):
        super().__init__(save_dir)
        self.got = []

    def log_image(self, key, images, step=None):
        self.got.append((key, images, step))


def assert_is_the_blue_figure(image):
    assert image.shape == (HEIGHT, WIDTH, 3)
    assert image.dtype == np.uint8
    assert (image == [0, 0, 255]).all()


def test_a_logger_with_log_image_gets_the_pixels(tmp_path, figure):
    logger = TakesImages(tmp_path)
    places = log_figure(make_trainer(tmp_path, logger), "a/curve", figure)
    assert places == ["TakesImages as 'a/curve'"]
    ((key, (image,), step),) = logger.got
    assert (key, step) == ("a/curve", 0)
    assert_is_the_blue_figure(image)
    assert list(tmp_path.glob("**/*.png")) == []


def test_tensorboard_gets_the_pixels(tmp_path, figure):
    logger = TensorBoardLogger(tmp_path)
    assert log_figure(make_trainer(tmp_path, logger), "curve", figure) == [
        "TensorBoardLogger as 'curve'"
    ]
    logger.experiment.flush()
    events = EventAccumulator(logger.log_dir).Reload()
    (event,) = events.Images("curve")
    assert_is_the_blue_figure(np.asarray(Image.open(io.BytesIO(event.encoded_image_string))))


@pytest.mark.parametrize("loggers", [[], ["csv"], ["dummy"]])
def test_without_such_a_logger_the_picture_is_a_file(tmp_path, figure, loggers):
    makers = {"csv": lambda: CSVLogger(tmp_path), "dummy": DummyLogger}
    trainer = make_trainer(tmp_path, *(makers[name]() for name in loggers))
    run = {"csv": tmp_path / "lightning_logs/version_0"}
    path = (run[loggers[0]] if loggers[:1] == ["csv"] else tmp_path) / "a_curve.png"
    assert log_figure(trainer, "a/curve", figure) == [str(path)]
    assert_is_the_blue_figure(np.asarray(Image.open(path).convert("RGB")))


def test_every_logger_and_the_asked_for_file_get_it(tmp_path, figure):
    loggers = [TakesImages(tmp_path), CSVLogger(tmp_path), TensorBoardLogger(tmp_path)]
    trainer = make_trainer(tmp_path, *loggers)
    places = log_figure(trainer, "curve", figure, filename="deep/b.png")
    (path,) = tmp_path.glob("lightning_logs/version_*/deep/b.png")
    assert places == ["TakesImages as 'curve'", "TensorBoardLogger as 'curve'", str(path)]


@pytest.mark.parametrize("cls", [CSVLogger, TensorBoardLogger])
def test_a_picture_lies_where_the_logger_and_model_checkpoint_write(tmp_path, figure, cls):
    places = []
    for version in (0, 1):
        trainer = make_trainer(tmp_path, cls(tmp_path / "logs", name="mine"))
        assert trainer.loggers[0].version == version
        places += log_figure(trainer, "curve", figure, filename="b.png")[-1:]
        assert places[-1] == str(tmp_path / f"logs/mine/version_{version}/b.png")
        checkpoint = pl.callbacks.ModelCheckpoint()
        assert resolve_checkpoint_dir(checkpoint, trainer) == places[-1].replace(
            "b.png", "checkpoints"
        )


def test_the_picture_of_an_earlier_run_stays(tmp_path, figure):
    trainer, other = make_trainer(tmp_path), make_trainer(tmp_path)
    for run, name in ((trainer, "b.png"), (trainer, "b.png"), (other, "b-v1.png")):
        assert log_figure(run, "curve", figure, filename="b.png") == [str(tmp_path / name)]
    assert log_figure(make_trainer(tmp_path), "b", figure) == [str(tmp_path / "b-v2.png")]


def test_only_rank_zero_draws(tmp_path, figure, monkeypatch):
    logger = TakesImages(tmp_path)
    trainer = make_trainer(tmp_path, logger)
    monkeypatch.setattr(type(trainer), "is_global_zero", False)
    assert log_figure(trainer, "curve", figure, filename="b.png") == []
    assert logger.got == []
    assert not (tmp_path / "b.png").exists()


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path, figure):
    logger = TakesImages(tmp_path)
    trainer = make_trainer(tmp_path, logger)
    folder = Path(logger.log_dir)
    folder.mkdir(parents=True)
    (folder / "taken").write_text("a file where a folder should be")
    with pytest.warns(UserWarning, match=r"'curve' was not written to .*taken/b\.png"):
        places = log_figure(trainer, "curve", figure, filename="taken/b.png")
    assert places == ["TakesImages as 'curve'"]


def test_default_root_dir_may_be_a_url(figure):
    import fsspec

    trainer = make_trainer("memory://pictures/run")
    assert log_figure(trainer, "curve", figure) == ["memory://pictures/run/curve.png"]
    with fsspec.open("memory://pictures/run/curve.png") as file:
        assert_is_the_blue_figure(np.asarray(Image.open(file).convert("RGB")))


def test_neither_wandb_nor_pyplot_is_imported(tmp_path, figure, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    trainer = make_trainer(tmp_path, TensorBoardLogger(tmp_path))
    assert len(log_figure(trainer, "curve", figure, filename="b.png")) == 2


def test_a_pyplot_figure_keeps_its_canvas(tmp_path):
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    figure = new_figure(2, 1)
    canvas = FigureCanvasSVG(figure)
    log_figure(make_trainer(tmp_path), "curve", figure)
    assert figure.canvas is canvas


class Regression(pl.LightningModule):
    def __init__(self, width=4):
        super().__init__()
        self.save_hyperparameters()
        self.layer = nn.Linear(width, 1)

    def training_step(self, batch, batch_idx):
        loss = self.layer(batch).square().mean()
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.layer(batch).square().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_an_offline_wandb_run_holds_metrics_config_and_picture(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(offline=True, save_dir=tmp_path, project="test")
    callback = MetricPlot(filename="run.png")
    trainer = make_trainer(
        tmp_path, logger, max_epochs=2, log_every_n_steps=1, callbacks=[callback]
    )
    # longer than two blocks of the file format: the reader must put its parts together
    logger.experiment.config.update({"long": "x" * 100_000})
    data = DataLoader(torch.randn(3, 2, 4), batch_size=None)
    trainer.fit(Regression(), data, data)

    run = read_wandb_run(tmp_path)
    assert (run.config["width"], run.config["long"]) == (4, "x" * 100_000)
    for name, steps in [("train_loss", 6), ("val_loss", 2)]:
        logged = [row[name] for row in run.history if name in row]
        assert logged == pytest.approx(callback.state_dict()["curves"][name]["values"])
        assert len(set(logged)) == steps
    (row,) = [row for row in run.history if "run" in row]
    assert row["run"]["count"] == 1
    assert row["trainer/global_step"] == 6
    (picture,) = [path for path in run.media if path.suffix == ".png"]
    (file,) = tmp_path.glob(f"test/{logger.version}/run.png")
    ours = np.asarray(Image.open(file).convert("RGB"))
    theirs = np.asarray(Image.open(picture).convert("RGB"))
    assert np.array_equal(ours, theirs)
