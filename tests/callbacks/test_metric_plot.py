import math
import sys

import jsonargparse
import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel

from lightning_align.callbacks.metric_plot import MetricPlot, arrange, draw_curves, is_noisy
from tests.helpers.covers import with_slow

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


class Plain(pl.LightningModule):
    """A hand-written module that knows nothing of us; it remembers what it logged."""

    def __init__(self, on_epoch=False):
        super().__init__()
        self.layer = nn.Linear(4, 1)
        self.on_epoch = on_epoch
        self.losses, self.val_means = [], []

    def loss(self, batch):
        return self.layer(batch).square().mean()

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.losses.append(loss.item())
        self.log("train_loss", loss, on_step=True, on_epoch=self.on_epoch)
        return loss

    def on_train_epoch_end(self):
        self.log("late", torch.tensor(float(self.current_epoch)))

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch))

    def on_validation_end(self):
        self.val_means.append(self.trainer.callback_metrics["val_loss"].item())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


class TinyGPT2(Plain):
    def __init__(self):
        super().__init__()
        config = GPT2Config(vocab_size=16, n_positions=8, n_embd=8, n_layer=1, n_head=1)
        config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0  # a resume must repeat
        self.layer = GPT2LMHeadModel(config)

    def loss(self, batch):
        ids = batch.argsort(dim=-1)
        return self.layer(input_ids=ids, labels=ids).loss


def fit(tmp_path, callback, module=None, *, batches=12, val=False, ckpt_path=None, **options):
    pl.seed_everything(0, verbose=False)
    module = module or Plain()
    data = torch.randn(batches, 3, 4, generator=torch.Generator().manual_seed(1))
    trainer = pl.Trainer(
        **{
            "accelerator": "cpu",
            "default_root_dir": tmp_path,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "max_epochs": 1,
            "log_every_n_steps": 1,
            "callbacks": [callback] if callback else [],
            **options,
        }
    )
    loaders = [DataLoader(data, batch_size=None)] * (2 if val else 1)
    trainer.fit(module, *loaders, ckpt_path=ckpt_path)
    return trainer, module


def curves(callback):
    """{name: {step: value}}, after checking that no step is recorded twice."""
    recorded = callback.state_dict()["curves"]
    for curve in recorded.values():
        assert curve["steps"] == sorted(set(curve["steps"]))
    return {
        name: dict(zip(curve["steps"], curve["values"], strict=True))
        for name, curve in recorded.items()
    }


def test_step_metrics_are_read_when_lightning_logs_them(tmp_path):
    callback = MetricPlot(metrics=["train_loss"])
    _, module = fit(tmp_path, callback, batches=12, log_every_n_steps=5)
    assert curves(callback) == {"train_loss": {step: module.losses[step - 1] for step in (5, 10)}}


def test_the_last_batch_of_an_epoch_is_not_sampled_besides(tmp_path):
    """Epochs of 12 steps, validation at their ends: an n-th step is every fifth and no other.

    In the curve of a run whose last batches were short, their extra points drew a spike of the
    gradient norm at every validation and pulled up the running mean.
    """
    callback = MetricPlot(metrics=["train_loss", "val_loss"])
    _, module = fit(
        tmp_path, callback, batches=12, val=True, max_epochs=3, log_every_n_steps=5, max_steps=33
    )
    ours = curves(callback)
    assert ours["train_loss"] == {step: module.losses[step - 1] for step in range(5, 31, 5)}
    assert list(ours["val_loss"]) == [12, 24]


def test_a_metric_that_was_not_logged_again_is_not_repeated(tmp_path):
    callback = MetricPlot(metrics=["train_loss", "val_loss", "late"])
    _, module = fit(tmp_path, callback, batches=12, val=True, val_check_interval=4, max_epochs=2)
    ours = curves(callback)
    assert ours["train_loss"] == dict(enumerate(module.losses, start=1))
    assert ours["val_loss"] == dict(zip((4, 8, 12, 16, 20, 24), module.val_means, strict=True))
    assert ours["late"] == {12: 0.0, 24: 1.0}


def test_inside_an_accumulation_window_nothing_is_read(tmp_path):
    callback = MetricPlot(metrics=["train_loss"])
    _, module = fit(tmp_path, callback, batches=12, accumulate_grad_batches=3)
    assert curves(callback)["train_loss"] == {
        step: module.losses[3 * step - 1] for step in (1, 2, 3, 4)
    }


def test_a_name_logged_per_step_and_epoch_means_the_step(tmp_path):
    callback = MetricPlot(metrics=["train_loss", "train_loss_epoch"])
    _, module = fit(tmp_path, callback, Plain(on_epoch=True), batches=6, max_epochs=2)
    ours = curves(callback)
    assert ours["train_loss"] == dict(enumerate(module.losses, start=1))
    means = [sum(module.losses[:6]) / 6, sum(module.losses[6:]) / 6]
    assert ours["train_loss_epoch"] == pytest.approx({6: means[0], 12: means[1]})


def test_sanity_check_and_plain_validation_are_not_part_of_the_curve(tmp_path):
    callback = MetricPlot(metrics=["train_loss", "val_loss"])
    trainer, module = fit(tmp_path, callback, batches=4, val=True, num_sanity_val_steps=2)
    trainer.validate(module, DataLoader(torch.ones(2, 3, 4), batch_size=None), verbose=False)
    _sanity, fitted, validated = module.val_means
    assert fitted != validated
    assert curves(callback)["val_loss"] == {4: fitted}


def test_a_metric_logged_between_two_reads_is_drawn_at_the_next(tmp_path):
    class Rare(Plain):
        def training_step(self, batch, batch_idx):
            if batch_idx == 6:
                self.log("rare", torch.tensor(7.0))
            return self.loss(batch)

    callback = MetricPlot(metrics=["rare"])
    fit(tmp_path, callback, Rare(), batches=22, log_every_n_steps=5)
    assert curves(callback) == {"rare": {10: 7.0}}


@pytest.mark.parametrize("steps", [6, 7])
def test_a_run_too_short_for_its_interval_is_drawn_step_by_step(tmp_path, steps):
    callback = MetricPlot(metrics=["train_loss", "val_loss"])
    options = {"val": True, "val_check_interval": 3, "log_every_n_steps": 4}
    _, module = fit(tmp_path, callback, batches=steps, **options)
    ours = curves(callback)
    assert ours["train_loss"] == dict(enumerate(module.losses, start=1))
    assert list(ours["val_loss"]) == [3, 6]
    assert (tmp_path / "curves.png").exists()


def test_a_short_run_that_was_resumed_is_drawn_step_by_step_too(tmp_path):
    first, resumed = MetricPlot(["train_loss"]), MetricPlot(["train_loss"])
    checkpoint = pl.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1)
    options = {"batches": 6, "log_every_n_steps": 50, "enable_checkpointing": True}
    _, straight = fit(tmp_path, first, **options, callbacks=[first, checkpoint])
    path = tmp_path / "epoch=0-step=2.ckpt"
    fit(tmp_path, resumed, ckpt_path=path, batches=6, log_every_n_steps=50)
    whole, ours = curves(first)["train_loss"], curves(resumed)["train_loss"]
    assert whole == dict(enumerate(straight.losses, 1))
    assert {step: ours[step] for step in (1, 2)} == {step: whole[step] for step in (1, 2)}
    assert 3 in ours


def test_what_was_not_logged_is_named(tmp_path):
    callback = MetricPlot(metrics=["trian_loss", "val_loss"])
    with pytest.warns(
        UserWarning, match=r"\['trian_loss'\]\): no values.*Logged were: .*train_loss"
    ):
        fit(tmp_path, callback, batches=6, val=True)
    assert list(curves(callback)) == ["val_loss"]


def test_log_every_0_steps_reads_no_step_metrics(tmp_path):
    callback = MetricPlot(metrics=["train_loss", "val_loss"])
    fit(tmp_path, callback, batches=6, val=True, log_every_n_steps=0)
    assert list(curves(callback)) == ["val_loss"]


@pytest.mark.parametrize("module", [Plain, TinyGPT2])
def test_draws_the_picture_and_leaves_training_bit_identical(tmp_path, module):
    pl.seed_everything(0, verbose=False)
    with_plot, without = module(), module()
    without.load_state_dict(with_plot.state_dict())
    fit(tmp_path, MetricPlot(filename="deep/run.png"), with_plot, val=True)
    fit(tmp_path, None, without, val=True)
    assert (tmp_path / "deep" / "run.png").read_bytes().startswith(PNG_SIGNATURE)
    assert with_plot.losses == without.losses
    for ours, theirs in zip(with_plot.parameters(), without.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("module", with_slow([Plain, TinyGPT2], ["Plain"]))
def test_a_resumed_run_draws_the_whole_curve(tmp_path, module):
    pl.seed_everything(0, verbose=False)
    straight, first, second = module(), module(), module()
    first.load_state_dict(straight.state_dict())
    names = ["train_loss", "val_loss", "late"]
    expected, ours = MetricPlot(names), MetricPlot(names)
    fit(tmp_path, expected, straight, batches=5, val=True, max_epochs=3)

    path = tmp_path / "first.ckpt"
    trainer, _ = fit(tmp_path, MetricPlot(names), first, batches=5, val=True)
    trainer.save_checkpoint(path)
    (saved,) = torch.load(path, weights_only=True)["callbacks"].values()
    assert saved["curves"]["train_loss"] == {"steps": [1, 2, 3, 4, 5], "values": first.losses}
    assert saved["curves"]["late"] == {"steps": [5], "values": [0.0]}
    fit(tmp_path, ours, second, batches=5, val=True, max_epochs=3, ckpt_path=path)
    assert curves(ours) == curves(expected)
    assert list(curves(ours)["train_loss"]) == list(range(1, 16))


def test_the_checkpoint_of_an_epoch_holds_the_mean_of_that_epoch(tmp_path):
    callback = MetricPlot(metrics=["train_loss_epoch"])
    checkpoint = ModelCheckpoint(tmp_path, filename="epoch", save_on_train_epoch_end=True)
    _, module = fit(
        tmp_path,
        callback,
        Plain(on_epoch=True),
        batches=4,
        callbacks=[callback, checkpoint],
        enable_checkpointing=True,
    )
    states = torch.load(tmp_path / "epoch.ckpt", weights_only=True)["callbacks"]
    (saved,) = [state["curves"] for state in states.values() if "curves" in state]
    assert saved["train_loss_epoch"]["steps"] == [4]
    assert saved["train_loss_epoch"]["values"] == pytest.approx([sum(module.losses) / 4])


class SyncedMean(Plain):
    """Rank r logs r + 1, reduced over the ranks only when somebody reads the epoch's mean."""

    def training_step(self, batch, batch_idx):
        value = torch.tensor(float(self.global_rank + 1))
        self.log("mean", value, on_step=False, on_epoch=True, sync_dist=True)
        return self.loss(batch)


def test_two_ranks_read_a_synced_mean_and_draw_once(tmp_path):
    callback = MetricPlot(metrics=["mean"])
    checkpoint = ModelCheckpoint(tmp_path, filename="epoch", save_on_train_epoch_end=True)
    fit(
        tmp_path,
        callback,
        SyncedMean(),
        batches=4,
        strategy="ddp_fork",
        devices=2,
        callbacks=[callback, checkpoint],
        enable_checkpointing=True,
    )
    states = torch.load(tmp_path / "epoch.ckpt", weights_only=True)["callbacks"]
    (saved,) = [state["curves"] for state in states.values() if "curves" in state]
    (value,) = saved["mean"]["values"]
    assert value == pytest.approx(1.5)
    assert [path.name for path in tmp_path.glob("*.png")] == ["curves.png"]


def test_state_round_trip_does_not_share_lists():
    saved = {"curves": {"train_loss": {"steps": [1, 2], "values": [0.5, 0.25]}}}
    callback = MetricPlot()
    callback.load_state_dict(saved)
    assert callback.state_dict() == saved
    assert (
        callback.state_dict()["curves"]["train_loss"]["steps"]
        is not (saved["curves"]["train_loss"]["steps"])
    )


def test_a_new_run_with_the_same_callback_starts_a_new_curve(tmp_path):
    callback = MetricPlot(metrics=["train_loss", "val_loss"])
    fit(tmp_path, callback, batches=6, val=True)
    fit(tmp_path, callback, batches=3)
    assert {name: list(curve) for name, curve in curves(callback).items()} == {
        "train_loss": [1, 2, 3]
    }


def test_a_rewound_run_keeps_the_last_value_of_each_step(tmp_path):
    class Rewind(pl.Callback):
        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step == 8 and not hasattr(self, "done"):
                self.done = True
                # what a spike guard's rewind looks like from here: fewer steps than before
                trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total.completed = 4  # noqa: E501

    callback = MetricPlot(metrics=["train_loss"])
    _, module = fit(tmp_path, callback, batches=12, callbacks=[Rewind(), callback])
    kept = module.losses[:4] + module.losses[8:]
    assert curves(callback)["train_loss"] == dict(enumerate(kept, start=1))


def test_names_that_were_never_logged_are_named_with_those_that_were(tmp_path):
    with pytest.warns(UserWarning, match=r"\['loss'\]\): no values.*late, train_loss"):
        fit(tmp_path, MetricPlot(metrics=["loss", "train_loss"]))
    assert (tmp_path / "curves.png").exists()
    (tmp_path / "curves.png").unlink()
    with pytest.warns(UserWarning, match=r"\['loss'\]\): no values"):
        fit(tmp_path, MetricPlot(metrics=["loss"]))
    assert not (tmp_path / "curves.png").exists()


def test_fast_dev_run_overwrites_no_picture(tmp_path):
    fit(tmp_path, MetricPlot(metrics=["train_loss"]), fast_dev_run=True)
    assert list(tmp_path.iterdir()) == []


def test_missing_matplotlib_is_reported_before_training(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    module = Plain()
    with pytest.raises(ImportError, match=r"pip install lightning-align\[plot\]"):
        fit(tmp_path, MetricPlot(), module)
    assert module.losses == []


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        ({"metrics": "train_loss"}, r"metrics='train_loss'\): must be a list"),
        ({"metrics": []}, r"metrics=\[\]\): must be a list"),
        ({"metrics": ["a", []]}, r"metrics=\['a', \[\]\]\): must be a list"),
        ({"filename": "curves.pdf"}, r"filename='curves.pdf'\): must end in '.png'"),
        ({"units": {"lr": "1"}}, r"units=\['lr'\]\): must be names.*Panels are \['loss'\]"),
    ],
)
def test_bad_arguments_are_refused(arguments, rule):
    with pytest.raises(ValueError, match=rf"^MetricPlot\({rule}"):
        MetricPlot(**arguments)


def test_arguments_come_from_yaml():
    parser = jsonargparse.ArgumentParser()
    parser.add_class_arguments(MetricPlot, "plot")
    parsed = parser.parse_string(
        """
        plot:
          metrics: [train_loss, val_loss, [rewards/chosen, rewards/rejected]]
          filename: a.png
          units: {loss: nats per token}
        """
    )
    callback = parser.instantiate_classes(parsed).plot
    assert callback.panels == [
        ("loss", ["train_loss", "val_loss"]),
        ("rewards", ["rewards/chosen", "rewards/rejected"]),
    ]


@pytest.mark.parametrize(
    ("metrics", "panels"),
    [
        (
            ["train_loss", "lr", "val_loss", "train_loss_epoch"],
            [("loss", ["train_loss", "val_loss", "train_loss_epoch"]), ("lr", ["lr"])],
        ),
        (
            ["rewards/accuracies", "val_rewards/accuracies"],
            [("rewards/accuracies", ["rewards/accuracies", "val_rewards/accuracies"])],
        ),
        (["train/loss", "val/loss"], [("loss", ["train/loss", "val/loss"])]),
        ([["val_loss", "lr"], "lr"], [("loss, lr", ["val_loss", "lr"]), ("lr", ["lr"])]),
    ],
)
def test_names_of_one_quantity_share_a_panel(metrics, panels):
    assert arrange(metrics) == panels


def test_drawn_panels_are_labelled():
    """Values 0, 1, 0, ...: every point turns back, and a mean of 300 // 15 = 20 points is 1/2."""
    noisy = {"steps": list(range(1, 301)), "values": [step % 2 for step in range(1, 301)]}
    sparse = {"steps": [100, 200, 300], "values": [0.1, math.nan, 0.3]}
    panels = [("loss", ["train_loss", "val_loss"]), ("lr", ["lr"]), ("gone", ["gone"])]
    figure = draw_curves(
        panels,
        {"train_loss": noisy, "val_loss": sparse, "lr": sparse},
        {"loss": "nats per token"},
    )
    loss, lr = figure.axes
    assert loss.get_ylabel() == "loss (nats per token)"
    assert (lr.get_ylabel(), lr.get_xlabel()) == ("lr", "optimizer steps")
    legend = [text.get_text() for text in loss.get_legend().get_texts()]
    assert legend == ["train_loss (mean of 20 points)", "val_loss"]
    assert lr.get_legend() is None
    raw, mean, validation = loss.lines
    assert list(raw.get_ydata()) == noisy["values"]
    assert mean.get_ydata() == pytest.approx([0.5] * 281)
    assert mean.get_xdata()[0] == pytest.approx(10.5)  # the middle of steps 1 to 20
    assert (validation.get_color(), raw.get_color()) == ("#D55E00", "#0072B2")


def test_a_smooth_or_short_curve_gets_no_running_mean():
    rng = np.random.default_rng(0)
    assert is_noisy(rng.normal(size=200))
    assert is_noisy(np.exp(-np.arange(200) / 50) + 0.05 * rng.normal(size=200))
    assert not is_noisy(np.exp(-np.arange(200) / 50))
    assert not is_noisy(rng.normal(size=60))
